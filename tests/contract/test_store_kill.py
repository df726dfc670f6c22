import random
import subprocess
import threading
import time
from pathlib import Path

import httpx
from loopback import free_port
from store_process import a_span, command, start

from llmtrace.traces.otlp import encode
from llmtrace.traces.tempo import TempoClient

KILLS = 3
SPANS = 40


def test_a_killed_store_has_every_acknowledged_span(tmp_path: Path) -> None:
    db = tmp_path / "traces.duckdb"
    acknowledged: list[str] = []
    numbers = iter(range(1, 10**9))
    lock = threading.Lock()

    def post_for_ever(url: str) -> None:
        with httpx.Client(timeout=5) as client:
            while True:
                with lock:
                    trace_id = f"{next(numbers):032x}"
                spans = [a_span(trace_id, number + 1) for number in range(SPANS)]
                body = encode(spans).SerializeToString()
                try:
                    response = client.post(
                        f"{url}/v1/traces", content=body, headers={"Content-Type": "application/x-protobuf"}
                    )
                except httpx.TransportError:
                    return
                assert response.status_code == 200
                acknowledged.append(trace_id)

    for _ in range(KILLS):
        port = free_port()
        process = start(db, port)
        writers = [threading.Thread(target=post_for_ever, args=(f"http://127.0.0.1:{port}",)) for _ in range(3)]
        for writer in writers:
            writer.start()
        time.sleep(random.uniform(0.5, 1))
        process.kill()
        process.wait()
        for writer in writers:
            writer.join()

    port = free_port()
    process = start(db, port)
    with TempoClient(f"http://127.0.0.1:{port}") as client:
        assert len(acknowledged) > KILLS
        for trace_id in random.sample(acknowledged, min(400, len(acknowledged))):
            trace = client.trace(trace_id)
            assert trace is not None, f"{trace_id} of {len(acknowledged)} is lost"
            assert len(trace.spans) == SPANS
        found = {one.trace_id for one in client.search("{}", start_s=0, end_s=2 * 10**9, limit=10_000)}
        assert len(acknowledged) > 9_000 or found >= set(acknowledged)
    process.terminate()
    assert process.wait(20) == 0


def refused(*arguments: str) -> str:
    result = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1
    return result.stderr


def test_a_second_store_on_a_file_is_refused(tmp_path: Path) -> None:
    db = tmp_path / "traces.duckdb"
    port = free_port()
    process = start(db, port)
    try:
        assert "open in another process" in refused("--db", str(db), "--port", str(free_port()))
        other = str(tmp_path / "other.duckdb")
        assert "cannot listen on 127.0.0.1" in refused("--db", other, "--port", str(port))
    finally:
        process.terminate()
        process.wait(20)


def test_bad_flags_and_files_are_refused(tmp_path: Path) -> None:
    db = tmp_path / "x.duckdb"
    db.write_bytes(b"nonsense" * 1000)
    assert "damaged" in refused("--db", str(db), "--port", str(free_port()))
    assert "--port" in refused("--db", str(db), "--port", "99999")
    assert "--max-bytes" in refused("--db", str(db), "--max-bytes", "5")
    assert "--db" in refused()
