from __future__ import annotations

import threading

import torch

from consilience.common.nets.seeding import generator, seeded


def test_generators_are_their_own() -> None:
    before = torch.random.get_rng_state()
    first = torch.rand(3, generator=generator(1, "a"))
    assert torch.equal(first, torch.rand(3, generator=generator(1, "a")))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_seeded_puts_the_state_back() -> None:
    before = torch.random.get_rng_state()
    with seeded(1):
        first = torch.rand(2)
    with seeded(1):
        assert torch.equal(torch.rand(2), first)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_threads_take_turns() -> None:
    found: list[torch.Tensor] = []

    def draw() -> None:
        for _ in range(50):
            with seeded(7):
                found.append(torch.cat([torch.rand(1) for _ in range(20)]))

    threads = [threading.Thread(target=draw) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 200
    assert all(torch.equal(row, found[0]) for row in found)
