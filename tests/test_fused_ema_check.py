"""What `ema_update_` refuses: each by the tensor's name, before anything is written."""

import pytest
import torch

from fused_ema import ema_update_


def bad(change):
    """Arguments of a call, one of them spoilt."""
    g = torch.Generator().manual_seed(0)
    targets, sources = ([torch.randn(n, generator=g) for n in (4, 6)] for _ in range(2))
    return {"targets": targets, "sources": sources, "decay": 0.9} | change(targets, sources)


SHARED, SQUARE = torch.zeros(10), torch.zeros(8, 8)


class Wrapping(torch.Tensor):
    """A wrapper without memory of its own, as quantised and distributed tensors are."""

    @staticmethod
    def __new__(cls, shape):
        return torch.Tensor._make_wrapper_subclass(cls, shape)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return function(*[[t] if isinstance(t, Wrapping) else t for t in args], **(kwargs or {}))


def in_inference_mode(*shape):
    with torch.inference_mode():
        return torch.zeros(shape)


REFUSED = {
    "one source short": (lambda t, s: {"sources": s[:1]}, ValueError, "2 targets but 1 sources"),
    "shape": (lambda t, s: {"sources": [s[0], s[0]]}, ValueError, r"target 1 has shape \[6\]"),
    "transposed": (
        lambda t, s: {"targets": [torch.zeros(2, 3)], "sources": [torch.zeros(3, 2)]},
        ValueError,
        "target 0",
    ),
    "target dtype": (
        lambda t, s: {"targets": [t[0], t[1].to(torch.float8_e5m2)]},
        TypeError,
        "target 1 is torch.float8",
    ),
    "complex": (lambda t, s: {"sources": [s[0] * 1j, s[1]]}, TypeError, "source 0 is torch.complex64.*view_as_real"),
    "source dtype": (lambda t, s: {"sources": [s[0].long(), s[1]]}, TypeError, "source 0 is torch.int64"),
    "meta": (lambda t, s: {"targets": [t[0], torch.empty(6, device="meta")]}, ValueError, "target 1 is on"),
    "sparse": (lambda t, s: {"sources": [s[0].to_sparse(), s[1]]}, TypeError, "source 0 is torch.sparse_coo"),
    "sparse rows": (
        lambda t, s: {"sources": [s[0], torch.eye(6).to_sparse_csr()]},
        TypeError,
        "source 1 is torch.sparse",
    ),
    "sparse target": (lambda t, s: {"targets": [t[0], t[1].to_sparse()]}, TypeError, "target 1 is torch.sparse_coo"),
    "mkldnn": (lambda t, s: {"targets": [t[0], t[1].to_mkldnn()]}, TypeError, "target 1 is torch._mkldnn"),
    "nested": (lambda t, s: {"sources": [s[0], torch.nested.nested_tensor([s[1]])]}, TypeError, "source 1 is a nested"),
    "jagged": (
        lambda t, s: {"targets": [torch.nested.nested_tensor([s[0]], layout=torch.jagged), t[1]]},
        TypeError,
        "target 0 is a nested",
    ),
    "quantised": (
        lambda t, s: {"sources": [s[0], torch.quantize_per_tensor(s[1], 0.1, 0, torch.qint8)]},
        TypeError,
        "source 1 is torch.qint8",
    ),
    "first target meta": (lambda t, s: {"targets": [t[0].to("meta"), t[1]]}, ValueError, "target 0 is on the meta"),
    "made in inference mode": (
        lambda t, s: {"targets": [t[0], in_inference_mode(6)]},
        ValueError,
        "target 1 was made in inference mode",
    ),
    "a wrapper": (lambda t, s: {"sources": [s[0], Wrapping((6,))]}, TypeError, "source 1 is a Wrapping without memory"),
    "in a graph": (
        lambda t, s: {"targets": [t[0], t[1].requires_grad_() * 2]},
        ValueError,
        "target 1 is part of an autograd graph",
    ),
    "overlap": (lambda t, s: {"targets": [SHARED[:4], SHARED[2:8]]}, ValueError, "target 0 and target 1 overlap"),
    "expanded": (lambda t, s: {"targets": [torch.zeros(1).expand(4), t[1]]}, ValueError, "target 0 overlaps itself"),
    "windows": (
        lambda t, s: {"targets": [SHARED.as_strided((2, 2), (2, 2))], "sources": [torch.ones(2, 2)]},
        ValueError,
        "target 0 overlaps itself",
    ),
    "columns that meet": (
        lambda t, s: {"targets": [SQUARE[:, 0], SQUARE.view(4, 16)[:, 0]], "sources": [torch.ones(8), torch.ones(4)]},
        ValueError,
        "target 0 and target 1 overlap",
    ),
    "read in another dtype": (
        lambda t, s: {"targets": [SHARED[:4], t[1]], "sources": [SHARED.view(torch.bfloat16)[7:11], s[1]]},
        ValueError,
        "target 0 and source 0 overlap",
    ),
    "copy over source": (lambda t, s: {"copies": [t[0].clone(), s[1]]}, ValueError, "copy 1 and source 1 overlap"),
    "its own source": (lambda t, s: {"sources": [s[0], t[1]]}, ValueError, "target 1 and source 1 overlap"),
    "a source across a target": (
        lambda t, s: {"targets": [SHARED[:4], t[1]], "sources": [s[0], SHARED[3:9]]},
        ValueError,
        "target 0 and source 1 overlap",
    ),
    "not a tensor": (lambda t, s: {"sources": [s[0], None]}, TypeError, "source 1 is a NoneType, not a tensor"),
    "gate not a tensor": (lambda t, s: {"gate": True}, TypeError, "gate must be a 0-dim bool tensor, got bool"),
    "bare tensors": (lambda t, s: {"targets": t[0], "sources": s[0]}, TypeError, "must be lists of tensors"),
    "few names": (lambda t, s: {"names": ["a"]}, ValueError, "1 names for 2 targets"),
    "too many layers": (lambda t, s: {"layers": [0, 10**15]}, ValueError, r"layers\[1\] is 1000000000000000"),
    "no copies": (lambda t, s: {"copies": []}, ValueError, "0 copies but 2 targets"),
    "few layers": (lambda t, s: {"layers": [0]}, ValueError, "1 layer numbers for 2 tensors"),
    "negative layer": (lambda t, s: {"layers": [0, -1]}, ValueError, r"layers\[1\] is -1"),
    "fractional layer": (lambda t, s: {"layers": [0.5, 1]}, TypeError, r"layers\[0\] is 0.5"),
    "decay above 1": (lambda t, s: {"decay": 1.01}, ValueError, "decay is 1.01"),
    "decay NaN": (lambda t, s: {"decay": float("nan")}, ValueError, "decay is nan"),
    "decay text": (lambda t, s: {"decay": "0.9"}, TypeError, "decay must be a number"),
    "decay float32 tensor": (lambda t, s: {"decay": torch.tensor(0.9)}, TypeError, "0-dim float64"),
    "decay tensor NaN": (
        lambda t, s: {"decay": torch.tensor(float("nan"), dtype=torch.float64)},
        ValueError,
        "decay is nan; it must lie in",
    ),
    "decay tensor above 1": (
        lambda t, s: {"decay": torch.tensor(1.5, dtype=torch.float64)},
        ValueError,
        r"decay is 1\.5",
    ),
    "named": (lambda t, s: {"sources": [s[0], s[0]], "names": ["a", "b"]}, ValueError, r"target b has shape \[6\]"),
    "gate number": (lambda t, s: {"gate": torch.tensor(1.0)}, TypeError, "0-dim bool"),
    "few copies": (lambda t, s: {"copies": [t[0].clone()]}, ValueError, "1 copies"),
    "copy shape": (lambda t, s: {"copies": [t[0].clone(), t[0].clone()]}, ValueError, "copy 1 has shape"),
    "backend": (lambda t, s: {"backend": "cuda"}, ValueError, "backend 'cuda' is none of"),
}


@pytest.mark.filterwarnings("ignore")  # torch calls sparse and nested tensors young
@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_named_and_nothing_is_written(case):
    change, kind, message = REFUSED[case]
    arguments = bad(change)
    strided = [t for t in arguments["targets"] if t.device.type == "cpu" and t.layout == torch.strided]
    before = [t.detach().clone() for t in strided]
    with pytest.raises(kind, match=message):
        ema_update_(**arguments)
    assert all(torch.equal(t, b) for t, b in zip(strided, before, strict=True))


@pytest.mark.parametrize("case", ["rows", "quadrants", "source beside target", "crossed strides", "source under gaps"])
def test_what_interleaves_without_meeting_is_taken(case):
    square, ones = torch.zeros(8, 8), torch.ones(4, 4)
    targets = {
        "rows": [square[::2, :4], square[1::2, :4]],
        "quadrants": [square[:4, :4], square[:4, 4:], square[4:, :4], square[4:, 4:]],
        "source beside target": [square[4:, :4]],
        "crossed strides": [square.as_strided((3, 2), (2, 3))],
        "source under gaps": [square[::2, ::2]],
    }[case]
    sources = {
        "source beside target": [square[4:, 4:]],
        "crossed strides": [torch.ones(3, 2)],
        "source under gaps": [square[0, 1:2].expand(4, 4)],
    }.get(case, [ones] * len(targets))
    want = [s.clone() for s in sources]
    ema_update_(targets, sources, 0.0)
    assert all(torch.equal(t, w) for t, w in zip(targets, want, strict=True))


def test_one_source_may_serve_many_targets():
    source, targets = torch.ones(5), [torch.zeros(5), torch.zeros(5)]
    ema_update_(targets, [source, source], 0.5)
    assert all((t == 0.5).all() for t in targets)
