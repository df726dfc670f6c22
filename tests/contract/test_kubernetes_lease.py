"""Leader election by a Lease, as client-go's: of several one holds it."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from kubernetes_server import ApiServer
from test_kubernetes_watch import kubeconfig

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from scaling import until

from llmtrace.autoscale.kubernetes.api import Api
from llmtrace.autoscale.kubernetes.leader import Lease

PATH = "/apis/coordination.k8s.io/v1/namespaces/tracing/leases"
NAME = "llmtrace-autoscale"


async def held(lease: Lease, seconds: float) -> bool:
    try:
        async with asyncio.timeout(seconds):
            await lease.acquire()
    except TimeoutError:
        return False
    return True


async def test_one_holds_it_and_another_takes_over_when_it_is_silent(tmp_path):
    async with ApiServer() as server:
        api = await Api.connect(kubeconfig(tmp_path, server.port))
        one, two = (Lease(api, "tracing", NAME, identity, 1.0) for identity in ("one", "two"))
        assert await held(one, 5)
        spec = server.objects[PATH][NAME]["spec"]
        assert (spec["holderIdentity"], spec["leaseDurationSeconds"], spec["leaseTransitions"]) == ("one", 1, 0)
        assert not await held(two, 0.5)
        assert await held(two, 5)
        assert server.objects[PATH][NAME]["spec"]["leaseTransitions"] == 1
        # The first notices at once.
        async with asyncio.timeout(0.7):
            await one.hold()
        await api.close()


async def test_whoever_renews_it_keeps_it(tmp_path):
    async with ApiServer() as server:
        api = await Api.connect(kubeconfig(tmp_path, server.port))
        one, two = (Lease(api, "tracing", NAME, identity, 1.0) for identity in ("one", "two"))
        assert await held(one, 5)
        acquired = server.objects[PATH][NAME]["spec"]["acquireTime"]
        holding = asyncio.create_task(one.hold())
        assert not await held(two, 2.5)
        assert not holding.done()
        assert server.objects[PATH][NAME]["spec"]["acquireTime"] == acquired
        holding.cancel()
        await one.release()
        # Given back: no need to wait for its end.
        async with asyncio.timeout(0.7):
            await two.acquire()
        await api.close()


async def test_an_api_server_that_is_gone_ends_the_term_before_another_may_begin(tmp_path):
    async with ApiServer() as server:
        api = await Api.connect(kubeconfig(tmp_path, server.port))
        lease = Lease(api, "tracing", NAME, "one", 1.0)
        assert await held(lease, 5)
        server.down = True
        begun = asyncio.get_running_loop().time()
        async with asyncio.timeout(5):
            await lease.hold()
        assert asyncio.get_running_loop().time() - begun < 1.0
        server.down = False
        assert await held(lease, 5)
        await api.close()


async def test_of_two_at_the_same_moment_one_gets_it(tmp_path):
    async with ApiServer() as server:
        api = await Api.connect(kubeconfig(tmp_path, server.port))
        tasks = [asyncio.create_task(Lease(api, "tracing", NAME, f"{n}", 1.0).acquire()) for n in range(4)]
        await until(lambda: any(t.done() for t in tasks), "a leader")
        await asyncio.sleep(0.1)
        assert sum(t.done() for t in tasks) == 1
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await api.close()
