"""project.serve.batching: nobody waits without need, nobody is lost, nobody gets another's answer."""

import asyncio
import gc
import random
import subprocess
import sys
import threading
import time
import weakref

import pytest

from project.serve.batching import Batcher, Cost, Full, answers


class Model:
    """Answers a number by itself; can be held up, and remembers each batch and the thread it ran in."""

    def __init__(self, name="model", held=False):
        self.name, self.batches, self.threads = name, [], []
        self.gate = threading.Event()
        self.entered = threading.Event()
        if not held:
            self.gate.set()

    def __call__(self, rows):
        self.batches.append(list(rows))
        self.threads.append(threading.get_ident())
        self.entered.set()
        assert self.gate.wait(20)
        if any(row < 0 for row in rows):
            raise ValueError(f"negative: {[row for row in rows if row < 0]}")
        return [(self.name, row) for row in rows], [[row] for row in rows]


def run(work):
    """Run a coroutine that must end by itself."""

    async def bounded():
        return await asyncio.wait_for(work, 20)

    return asyncio.run(bounded())


def batcher(model, **options):
    """One for numbers, which all weigh the same; in the thread unless said otherwise."""
    return learnt(Batcher(model, **{"weigh": lambda row: 1, "inline": 0} | options))


def learnt(b):
    """It knows the model as quick, and so takes a test that holds the model up for a hiccup."""
    for kind in range(12):
        b._cost.saw(kind, 1, 1e-5)
    return b


def sent(b, rows, **options):
    """Senders that have not begun yet."""
    return [asyncio.ensure_future(b.submit(row, **options)) for row in rows]


async def entered(model):
    """Wait until the model has a batch in hand, and be ready for the next."""
    await asyncio.to_thread(model.entered.wait, 10)
    model.entered.clear()


# --- how batches come about


@pytest.mark.parametrize("inline", [0, 1.0])
def test_an_idle_one_answers_at_once_and_alone(inline):
    async def work():
        async with batcher(model, max_wait=60, inline=inline) as b:
            return [await b.submit(i) for i in range(20)], b.batches, b.rows, b.depth

    model = Model()
    found, batches, rows, depth = run(work())
    assert found == [(("model", i), [i], 1) for i in range(20)]
    assert (batches, rows, depth) == (20, 20, 0)


def test_after_a_rush_one_that_comes_alone_does_not_wait():
    async def work():
        async with batcher(model, max_wait=60) as b:
            await asyncio.gather(*sent(b, range(100)))
            return await b.submit(5)

    model = Model()
    assert run(work()) == (("model", 5), [5], 1)


def test_a_batch_is_what_came_while_the_model_was_busy():
    async def work():
        async with batcher(model, max_batch=32) as b:
            first = sent(b, [0])
            await entered(model)
            others = sent(b, range(1, 41))
            await asyncio.sleep(0)
            assert b.depth == 40
            model.gate.set()
            return await asyncio.gather(*first, *others)

    model = Model(held=True)
    found = run(work())
    assert [len(batch) for batch in model.batches] == [1, 32, 8]
    assert [p[1] for p, _, _ in found] == list(range(41))  # each its own answer
    assert [n for _, _, n in found] == [1] + [32] * 32 + [8] * 8


@pytest.mark.parametrize("inline", [0, 0.0005, 10])
def test_answers_find_their_senders(inline):
    async def sender(b, i):
        await asyncio.sleep(random.Random(i).random() / 20)
        p, e, size = await b.submit(i)
        assert (p, e) == (("model", i), [i]) and 1 <= size <= 7

    async def work():
        async with batcher(Model(), max_batch=7, max_queue=1000, inline=inline) as b:
            await asyncio.gather(*(sender(b, i) for i in range(600)))
            assert b.rows == 600

    run(work())


def test_no_wake_up_is_lost():
    async def sender(b, rows):
        for i in rows:
            assert (await b.submit(i))[0] == ("model", i)

    async def work():
        async with batcher(Model()) as b:
            await asyncio.gather(*(sender(b, range(k, 3000, 3)) for k in range(3)))

    run(work())


def test_a_slow_model_runs_beside_the_event_loop_and_a_quick_one_in_it():
    async def work():
        async with Batcher(slow, weigh=abs, inline=0.0005) as b:
            asyncio.get_running_loop().call_later(0.05, slow.gate.set)  # never, if the loop stood still
            await b.submit(1)
        async with Batcher(quick, weigh=abs, inline=10) as b:
            for row in range(1, 200):  # how quick it is, nobody knows before the first
                await b.submit(row)
                await asyncio.sleep(0.01)  # the thread falls asleep
                if row > 1 and quick.threads[-1] == here:
                    break

    slow, quick, here = Model(held=True), Model(), threading.get_ident()
    run(work())
    assert slow.threads[0] != here
    assert quick.threads[0] != here and quick.threads[-1] == here


def test_a_slow_row_does_not_run_in_the_event_loop_behind_a_quick_one():
    async def work():
        async with Batcher(model, weigh=abs, inline=0.01) as b:
            await b.submit(1)
            b._cost.saw(7, 1, 1.0)  # rows from 64 on take a second
            await asyncio.gather(*sent(b, [1, 100, 1]))

    model = Model()
    run(work())
    where = dict(zip(map(tuple, model.batches), model.threads, strict=True))
    assert where[100,] != threading.get_ident()


def test_long_ones_and_short_ones_are_apart_and_none_waits_for_ever():
    async def work():
        async with batcher(model, weigh=abs, max_batch=4) as b:
            first = sent(b, [1])
            await entered(model)
            others = sent(b, [2, 500, 3, 2, 300, 3, 2, 2])
            await asyncio.sleep(0)
            model.gate.set()
            await asyncio.gather(*first, *others)

    model = Model(held=True)
    run(work())
    assert model.batches == [[1], [2, 3, 2, 3], [500, 300], [2, 2]]


def test_batches_of_a_slow_model_are_small():
    b = Batcher(Model())
    assert b._size(1) == 32
    b._cost.saw(1, 10, 0.1)
    assert b._size(1) == 5  # a twentieth of a second
    b._cost.saw(2, 1, 3.0)
    assert b._size(2) == 1  # perhaps only because it was the first
    for _ in range(20):
        b._cost.saw(2, 1, 0.001)
    assert b._size(2) == 32


def test_waiting_for_mates_pays_or_does_not_happen():
    cost = Cost()
    for _ in range(50):
        cost.saw(1, 1, 0.004)
    assert cost.saved(1) == 0  # no batch was seen
    for _ in range(50):
        cost.saw(1, 10, 0.005)
    assert cost.saved(1) == pytest.approx(0.0035, abs=1e-4)
    cost.saw(1, 10, 60.0)  # one hiccup
    assert cost.row(1) < 0.001


# --- what is refused


def test_a_full_queue_refuses_at_once_and_says_when():
    async def work():
        async with batcher(model, max_queue=5) as b:
            first = sent(b, [0])
            await entered(model)
            others = sent(b, range(1, 6))
            await asyncio.sleep(0)
            with pytest.raises(Full, match="5 rows are waiting; try again in") as told:
                await b.submit(6)
            assert told.value.retry_after > 0
            others[2].cancel()  # makes room
            await asyncio.sleep(0)
            late = sent(b, [7])
            await asyncio.sleep(0)
            model.gate.set()
            return await asyncio.gather(*first, *others, *late, return_exceptions=True)

    model = Model(held=True)
    found = run(work())
    assert isinstance(found[3], asyncio.CancelledError)
    assert [p[1] for p, _, _ in found[:3] + found[4:]] == [0, 1, 2, 4, 5, 7]
    assert model.batches == [[0], [1, 2, 4, 5, 7]]


def test_who_would_wait_too_long_is_refused():
    async def work():
        async with batcher(model, max_delay=2.0) as b:
            b._cost._each[1] = 0.9  # seconds a row
            first = sent(b, [0])
            await entered(model)
            others = sent(b, [1, 2, 3, 4, 5])
            await asyncio.sleep(0)
            model.gate.set()
            return await asyncio.gather(*first, *others, return_exceptions=True)

    model = Model(held=True)
    found = run(work())
    assert [isinstance(answer, Full) for answer in found] == [False] * 4 + [True] * 2
    assert found[4].retry_after == pytest.approx(2.7, abs=0.1)


def test_a_model_slower_than_the_limit_still_answers_one():
    async def work():
        async with batcher(Model(), max_delay=0.001) as b:
            b._cost._each[1] = 100.0  # seconds a row
            return await b.submit(1)

    assert run(work())[0] == ("model", 1)


def test_five_times_too_many():
    async def sender(b, i):
        try:
            return (await b.submit(i))[0][1] == i
        except Full as e:
            return e

    async def work():
        deepest = 0
        async with batcher(Model(), max_queue=64, max_batch=8) as b:
            found = []
            for start in range(0, 3200, 320):
                flood = [asyncio.ensure_future(sender(b, start + i)) for i in range(320)]
                await asyncio.sleep(0)
                deepest = max(deepest, b.depth)
                found += await asyncio.gather(*flood)
            return found, deepest, b.rows

    found, deepest, rows = run(work())
    assert deepest <= 64
    assert rows == sum(x is True for x in found) >= 64 * 10
    assert sum(isinstance(x, Full) for x in found) == 3200 - rows > 1000


@pytest.mark.parametrize("wrong", [{"max_batch": 0}, {"max_queue": 0}])
def test_limits_that_make_no_sense(wrong):
    with pytest.raises(ValueError, match="expected 1 or more, found 0"):
        Batcher(Model(), **wrong)


# --- what goes wrong


def test_one_bad_row_fails_alone():
    rows = [3, 4, -1, 5, 6, 7, 8, 9]
    model = Model()
    found = answers(model, rows)
    assert isinstance(found[2], ValueError) and str(found[2]) == "negative: [-1]"
    assert [x[0][1] for i, x in enumerate(found) if i != 2] == [3, 4, 5, 6, 7, 8, 9]
    assert len(model.batches) == 7
    assert [str(e) for e in answers(model, [-1, -2, -3])] == [f"negative: [{-i}]" for i in (1, 2, 3)]


def test_a_bad_row_fails_alone_among_senders():
    async def work():
        async with batcher(model) as b:
            first = sent(b, [0])
            await entered(model)
            others = sent(b, [1, -2, 3, -4, 5])
            await asyncio.sleep(0)
            model.gate.set()
            found = await asyncio.gather(*first, *others, return_exceptions=True)
            return found, b.failed

    model = Model(held=True)
    found, failed = run(work())
    assert [str(x) if isinstance(x, ValueError) else x[0][1] for x in found] == [
        0,
        1,
        "negative: [-2]",
        3,
        "negative: [-4]",
        5,
    ]
    assert failed == 2


def stops(rows):
    raise StopIteration


class PanicException(BaseException):
    """As libraries in Rust raise it."""


def panics(rows):
    raise PanicException("index out of bounds")


@pytest.mark.parametrize(
    ("model", "kind", "message"),
    [
        (lambda rows: ([1], [1]), ValueError, "expected an answer for each of 2 rows, found 1 and 1"),
        (lambda rows: (None, None), TypeError, "NoneType"),
        (stops, RuntimeError, "StopIteration"),
        (panics, RuntimeError, "the model failed: PanicException.*out of bounds"),
    ],
)
def test_models_that_do_not_answer(model, kind, message):
    async def work():
        async with batcher(model) as b:
            found = await asyncio.gather(*sent(b, [1, 2]), return_exceptions=True)
            b.swap(Model())
            return found, await b.submit(3)

    found, after = run(work())
    if "2 rows" in message:
        assert found == [(1, 1, 1)] * 2  # alone, it was one answer for one row
    else:
        for e in found:
            with pytest.raises(kind, match=message):
                raise e
        assert found[0] is not found[1]
    assert after == (("model", 3), [3], 1)


def test_a_sender_that_goes_away_costs_the_others_nothing():
    async def work():
        async with batcher(model) as b:
            first = sent(b, [0])
            await entered(model)
            others = sent(b, [1, 2, 3])
            await asyncio.sleep(0)
            first[0].cancel()  # is in hand
            others[1].cancel()  # waits
            await asyncio.sleep(0)
            model.gate.set()
            return await asyncio.gather(*first, *others, return_exceptions=True)

    model = Model(held=True)
    found = run(work())
    assert [isinstance(x, asyncio.CancelledError) for x in found] == [True, False, True, False]
    assert model.batches == [[0], [1, 3]]


def test_all_senders_go_away():
    async def work():
        async with batcher(model) as b:
            flood = sent(b, range(50))
            await asyncio.sleep(0)
            for one in flood:
                one.cancel()
            await asyncio.gather(*flood, return_exceptions=True)
            model.gate.set()
            return await b.submit(99)

    model = Model(held=True)
    assert run(work())[0] == ("model", 99)


@pytest.mark.parametrize("inline", [0, 10])
def test_who_watches_is_told_of_each_batch_and_breaks_nothing(inline):
    async def work():
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
        async with batcher(Model(), max_batch=4, inline=inline) as b:
            b.on_batch = watch
            found = await asyncio.gather(*sent(b, range(30)))
            await asyncio.sleep(0.01)
            return found, b.batches

    def watch(rows, seconds):
        seen.append((rows, seconds))
        raise KeyError("the watcher's own fault")

    seen, complaints = [], []
    found, batches = run(work())
    assert [p[1] for p, _, _ in found] == list(range(30))
    assert len(seen) == batches == len(complaints) and sum(rows for rows, _ in seen) == 30
    assert all(seconds >= 0 for _, seconds in seen)


def test_nothing_is_kept_of_what_was_answered():
    class Row:
        pass

    async def work():
        async with batcher(lambda rows: (range(len(rows)), range(len(rows)))) as b:
            row = Row()
            seen = weakref.ref(row)
            await b.submit(row)
            del row
            await asyncio.sleep(0.05)
            gc.collect()
            return seen()

    assert run(work()) is None


# --- another model, and the end


def test_swap_under_load():
    old, new = Model("old"), Model("new")

    async def work():
        found = []

        async def sender(i):
            for k in range(100):
                model = b.predict  # as a request handler does: read for this one, answered by this one
                p, _, _ = await b.submit(i * 100 + k, model)
                found.append((model.name, p, i * 100 + k))
                await asyncio.sleep(0)

        async with batcher(old) as b:
            senders = [asyncio.ensure_future(sender(i)) for i in range(20)]
            while len(found) < 500:
                await asyncio.sleep(0.001)
            b.swap(new)
            await asyncio.gather(*senders)
        return found

    found = run(work())
    assert len(found) == 2000
    assert all(p == (name, row) for name, p, row in found)
    assert old.batches and new.batches
    assert sorted(row for model in (old, new) for batch in model.batches for row in batch) == list(range(2000))


def test_models_are_not_mixed_in_a_batch():
    old, new = Model("old", held=True), Model("new")

    async def work():
        async with batcher(old) as b:
            first = sent(b, [0])
            await entered(old)
            others = sent(b, [1, 2]) + sent(b, [3, 4], predict=new)
            await asyncio.sleep(0)
            old.gate.set()
            return await asyncio.gather(*first, *others)

    assert [p for p, _, _ in run(work())] == [("old", 0), ("old", 1), ("old", 2), ("new", 3), ("new", 4)]
    assert new.batches == [[3, 4]]


def threads():
    """How many threads of batchers there are."""
    return sum(t.name == "batcher" for t in threading.enumerate())


def test_close_answers_those_it_accepted_and_no_more():
    async def work():
        b = await batcher(model).start()
        assert await b.start() is b and threads() == 1
        first = sent(b, [0])
        await entered(model)
        others = sent(b, range(1, 50))
        await asyncio.sleep(0)
        closing = asyncio.ensure_future(b.close())
        await asyncio.sleep(0)
        with pytest.raises(Full, match="no rows are taken"):
            await b.submit(99)
        model.gate.set()
        await closing
        await b.close()
        return await asyncio.gather(*first, *others)

    model = Model(held=True)
    assert [p[1] for p, _, _ in run(work())] == list(range(50))
    assert threads() == 0


def test_close_does_not_wait_for_ever():
    async def work():
        b = await batcher(model, max_batch=2).start()
        first = sent(b, [0])
        await entered(model)
        others = sent(b, [1, 2, 3])
        await asyncio.sleep(0)
        await b.close(0.05)
        found = await asyncio.gather(*first, *others, return_exceptions=True)
        model.gate.set()
        return found

    model = Model(held=True)
    found = run(work())
    assert [str(e) for e in found] == ["the server is closing; try again in 1.0 s"] * 4
    for _ in range(200):
        time.sleep(0.01 if threads() else 0)
    assert threads() == 0  # when the model lets go


def test_not_started():
    async def work():
        with pytest.raises(Full):
            await b.submit(1)
        await b.close()

    b = batcher(Model())
    run(work())


def test_import_is_light():
    code = (
        "import sys, threading; import project.serve.batching\n"
        "print(threading.active_count(), [m for m in ('numpy', 'torch', 'onnxruntime', 'fastapi') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout
    assert found.split() == ["1", "[]"]
