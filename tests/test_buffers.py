"""Buffers are filled again only when the device, or whoever holds them, is done with them."""

import threading

import numpy as np
import torch

from jepa_fast.data.loading.buffers import PageableBuffers, PinnedBuffers


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
    buffers = PinnedBuffers(2, lambda: torch.zeros(3), lambda: copies.append(Copy()) or copies[-1])
    a, b = buffers.take(0.1), buffers.take(0.1)
    assert a is not b and buffers.take(0.01) is None
    buffers.give_back(a)
    got = []
    waiting = threading.Thread(target=lambda: got.append(buffers.take(5)))
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive() and not got  # the device still reads
    copies[0].passed.set()
    waiting.join(5)
    assert got[0] is a and copies[0].waited and len(copies) == 1


def test_a_fresh_buffer_waits_for_nothing():
    buffers = PinnedBuffers(1, lambda: torch.zeros(1), lambda: Copy())
    assert buffers.take(0) is not None


def test_memory_is_given_out_again_when_nothing_refers_to_it_and_not_before():
    memory = PageableBuffers((4, 3), np.dtype(np.uint8))
    first = memory.take()
    where, row, kept = first.data_ptr(), first[1:2], first.numpy()[2]
    assert memory.take().data_ptr() != where
    del first
    assert memory.take().data_ptr() != where  # a row of it is still held
    del row
    assert memory.take().data_ptr() != where  # as an array
    del kept
    taken = [memory.take() for _ in range(3)]
    assert where in {t.data_ptr() for t in taken} and len({t.data_ptr() for t in taken}) == 3
