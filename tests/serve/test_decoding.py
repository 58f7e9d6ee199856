"""Small images do not wait for large ones."""

import asyncio
import threading

import pytest

from asking import until
from featnorm.serve.decoding import Decoders

LARGE = 49_000_000


class Work:
    """Work that records its beginning, and ends when the test lets it."""

    def __init__(self):
        self.begun = []
        self.ends = threading.Semaphore(0)

    def __call__(self, name, *, waits=True):
        def work():
            self.begun.append(name)
            assert not waits or self.ends.acquire(timeout=30)
            return name

        return work


@pytest.fixture
def work():
    return Work()


def decoding(test):
    async def main():
        decoders = Decoders()
        try:
            await test(decoders)
        finally:
            decoders.close()

    asyncio.run(main())


def test_a_thread_is_kept_for_small_images(work):
    async def test(decoders):
        large = [decoders.submit(work(i), LARGE) for i in range(10)]
        await until(lambda: work.begun == [0])
        assert decoders.pixels == 10 * LARGE
        assert await decoders.submit(work("small", waits=False), 1000) == "small"
        assert work.begun == [0, "small"]
        assert decoders.pixels == 10 * LARGE
        work.ends.release(10)
        assert await asyncio.gather(*large) == list(range(10))
        assert work.begun == [0, "small", *range(1, 10)]
        assert decoders.pixels == 0

    decoding(test)


def test_an_image_is_delayed_by_its_own_decoding_time(work):
    async def test(decoders):
        running = [decoders.submit(work(i), 10) for i in range(2)]
        await until(lambda: len(work.begun) == 2)
        sizes = {"middle": 15_000_000, "large": LARGE, "small": 1000, "tiny": 10}
        waiting = [decoders.submit(work(name, waits=False), size) for name, size in sizes.items()]
        await asyncio.sleep(0)
        assert decoders.pixels == 20 + sum(sizes.values())
        work.ends.release()
        await asyncio.gather(*waiting)
        # By size if they arrived at the same time; one thread was free.
        assert [name for name in work.begun[2:] if name not in ("small", "tiny")] == ["middle", "large"]
        assert {*work.begun[2:4]} == {"small", "tiny"}
        work.ends.release()
        await asyncio.gather(*running)
        assert decoders.pixels == 0

    decoding(test)


def test_a_cancelled_request_frees_its_pixels(work):
    async def test(decoders):
        tasks = [decoders.submit(work(i), LARGE) for i in range(3)]
        await until(lambda: work.begun == [0])
        tasks[1].cancel()
        await asyncio.wait({tasks[1]})
        assert decoders.pixels == 2 * LARGE
        # Work that has begun occupies its thread until it is done.
        tasks[0].cancel()
        await asyncio.wait({tasks[0]})
        assert decoders.pixels == 2 * LARGE
        work.ends.release(2)
        assert await tasks[2] == 2
        assert work.begun == [0, 2]
        assert decoders.pixels == 0

    decoding(test)


def test_work_that_fails(work):
    async def test(decoders):
        with pytest.raises(ZeroDivisionError):
            await decoders.submit(lambda: 1 // 0, LARGE)
        assert decoders.pixels == 0
        assert await decoders.submit(work(1, waits=False), LARGE) == 1

    decoding(test)
