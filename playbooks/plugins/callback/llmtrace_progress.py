"""Ansible stdout callback: a line per task, a heartbeat for long ones, failures as their sentence."""

from __future__ import annotations

import threading
import time

from ansible import constants
from ansible.plugins.callback import CallbackBase

DOCUMENTATION = """
name: llmtrace_progress
type: stdout
short_description: A line per task, with expected and elapsed times
description:
  - Prints a line per task that ran, with the time since the start.
  - Skipped tasks and argument checks are not shown.
  - A task with the variable C(expected_seconds) is announced with that time; where it is null, as one of minutes.
    It is a plain number, for variables have no values yet when a task is announced.
  - Its elapsed time is shown every 10 seconds.
  - A failure is shown as its message alone; C(-v) adds the whole result.
extends_documentation_fragment: [result_format_callback]
"""

ANNOUNCE_AFTER_S = 0.7
HEARTBEAT_S = 10
HIDDEN_ACTIONS = {
    "ansible.builtin.validate_argument_spec",
    "ansible.builtin.set_fact",
    "ansible.builtin.stat",
}


def on(result):
    """Which host it was, where it was not this machine."""
    name = result.host.get_name()
    return "" if name == "localhost" else f" on {name}"


class Heartbeat(threading.Thread):
    """Announces a long task and says every HEARTBEAT_S seconds that it goes on."""

    def __init__(self, say, title, expected_s):
        super().__init__(daemon=True)
        self.say = say
        self.title = title
        self.expected_s = expected_s
        self.ended = threading.Event()

    def run(self):
        """Run until the task ended; a task that ends at once (skipped) is never announced."""
        started = time.monotonic()
        if self.ended.wait(ANNOUNCE_AFTER_S):
            return
        known = self.expected_s is not None
        self.say(f"{'start':8} {self.title} ({f'about {self.expected_s:.0f} s' if known else 'minutes'})")
        of = f" of about {self.expected_s:.0f} s" if known else ""
        while not self.ended.wait(HEARTBEAT_S):
            self.say(f"{'...':8} {self.title}: {time.monotonic() - started:.0f} s{of}")

    def end(self):
        """End the heartbeat."""
        self.ended.set()
        self.join()


class CallbackModule(CallbackBase):
    """See DOCUMENTATION."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "stdout"
    CALLBACK_NAME = "llmtrace_progress"

    def __init__(self):
        super().__init__()
        self.started = self.task_started = time.monotonic()
        self.heartbeat = None
        self.play = ""
        self.failed = False
        self.said = False

    def say(self, text, color=None):
        """Print a line with the time since the start."""
        elapsed = int(time.monotonic() - self.started)
        self._display.display(f"[{elapsed // 60:2d}:{elapsed % 60:02d}] {text}", color=color)

    def v2_playbook_on_play_start(self, play):
        """Keep the play's name until a task of it begins: a play without hosts is not worth a line."""
        mode = " (check mode: nothing is changed)" if play.check_mode else ""
        self.play = f"{play.get_name()}{mode}"

    def v2_playbook_on_task_start(self, task, is_conditional):
        """Name the play before its first task, and start the heartbeat of a long one."""
        self.end_heartbeat()
        if self.play:
            self.say(self.play)
            self.play = ""
        self.task_started = time.monotonic()
        self.said = False
        if "expected_seconds" in task.vars:
            self.heartbeat = Heartbeat(self.say, task.get_name(), task.vars["expected_seconds"])
            self.heartbeat.start()

    def v2_playbook_on_handler_task_start(self, task):
        """Treat a handler like a task."""
        self.v2_playbook_on_task_start(task, False)

    def end_heartbeat(self):
        """Stop the heartbeat of the last task, if any."""
        if self.heartbeat:
            self.heartbeat.end()
            self.heartbeat = None

    def v2_runner_on_ok(self, result):
        """Print a task that ran."""
        self.end_heartbeat()
        self._handle_warnings(result.result)
        task = result.task
        if result.is_changed():
            status, color = "changed", constants.COLOR_CHANGED
        elif task.resolved_action in HIDDEN_ACTIONS or task.action in HIDDEN_ACTIONS:
            return
        else:
            status, color = "ok", constants.COLOR_OK
        took = time.monotonic() - self.task_started
        detail = f" ({took:.0f} s)" if took >= 1 else ""
        if task.resolved_action == "ansible.builtin.debug" and "msg" in result.result:
            detail = f": {result.result['msg']}"
        elif actions := result.result.get("actions"):
            detail += f": {actions}"
        elif took_s := result.result.get("took_s"):
            detail += ": " + ", ".join(f"{name} {seconds:.0f} s" for name, seconds in took_s.items())
        # Of several hosts that did the same thing, one speaks for all.
        line = f"{status:8} {task.get_name()}{'' if status == 'ok' else on(result)}{detail}"
        if status == "changed" or not self.said:
            self.say(line, color)
        self.said = True
        if self._display.verbosity:
            self._display.display(self._dump_results(result.result))

    def v2_on_file_diff(self, result):
        """Print what --diff shows."""
        for item in result.result.get("results", [result.result]):
            if item.get("diff") and item.get("changed"):
                self._display.display(self._get_diff(item["diff"]))

    def fail(self, result):
        """Print a failure as its message."""
        self.end_heartbeat()
        self.failed = True
        message = result.result.get("msg") or "failed without a message; run again with -v"
        words = [text for name in ("stderr", "stdout") if (text := str(result.result.get(name) or "").strip())]
        said = "\n".join("\n".join(words).splitlines()[-20:])
        self.say(f"{'FAILED':8} {result.task.get_name()}{on(result)}", constants.COLOR_ERROR)
        self._display.display(f"{message}\n{said}".rstrip(), color=constants.COLOR_ERROR, stderr=True)
        if self._display.verbosity:
            self._display.display(self._dump_results(result.result))

    def v2_runner_on_failed(self, result, ignore_errors=False):
        """Print a failure; those of a loop's items were printed already."""
        if "results" not in result.result:
            self.fail(result)
        self.end_heartbeat()

    def v2_runner_item_on_failed(self, result):
        """Print the failure of a loop's item."""
        self.fail(result)

    def v2_runner_on_unreachable(self, result):
        """Print a host that cannot be reached, unless a later task says so."""
        if not result.task.ignore_unreachable:
            self.fail(result)

    def v2_playbook_on_stats(self, stats):
        """Print the recap."""
        self.end_heartbeat()
        for host in sorted(stats.processed):
            summary = stats.summarize(host)
            parts = ", ".join(f"{name}={summary[name]}" for name in ("ok", "changed", "failures", "unreachable"))
            color = constants.COLOR_ERROR if summary["failures"] or summary["unreachable"] else constants.COLOR_OK
            self.say(f"{host}: {parts}", color)
