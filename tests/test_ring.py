"""Buffers are filled again only when the device is done with them."""

import threading

import torch

from jepa_fast.data.ring import Ring


class Copy:
    """An event that passes when somebody says so."""

    def __init__(self):
        self.passed = threading.Event()
        self.waited = False

    def synchronize(self):
        self.waited = True
        assert self.passed.wait(5)


def test_a_buffer_comes_back_only_after_its_copy_is_done():
    copies = []
    ring = Ring(2, lambda: torch.zeros(3), lambda: copies.append(Copy()) or copies[-1])
    a, b = ring.take(0.1), ring.take(0.1)
    assert a is not b and ring.take(0.01) is None
    ring.give_back(a)
    got = []
    waiting = threading.Thread(target=lambda: got.append(ring.take(5)))
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive() and not got  # the device still reads
    copies[0].passed.set()
    waiting.join(5)
    assert got[0] is a and copies[0].waited and len(copies) == 1


def test_a_fresh_buffer_waits_for_nothing():
    ring = Ring(1, lambda: torch.zeros(1), lambda: Copy())
    assert ring.take(0) is not None
