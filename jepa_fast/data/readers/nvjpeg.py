"""JPEGs -> pixels of the training size on the GPU: decoded in one batch by nvJPEG (torchvision), cropped and resized there.

In: encoded images and the boxes wanted, as drawn for the CPU's decoder. Out: uint8 [C, size, size] on the device. Pixels
differ by a few of 255 from the CPU's. What nvJPEG refuses is decoded on the CPU, and counted in `refused`.
"""

import importlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from jepa_fast.config import Data
from jepa_fast.data.readers import images
from jepa_fast.data.sample import BadSample, Encoded
from jepa_fast.errors import UsageError

DecodeJpeg = Callable[..., list[Tensor]]  # torchvision.io.decode_jpeg, given a list


class DeviceDecoder:
    """Decodes on a stream of its own, so that the loop's step and the next batch share the GPU."""

    def __init__(self, data: Data, device: torch.device, decode_jpeg: DecodeJpeg):
        self.data, self.device, self.refused = data, device, 0
        self._decode_jpeg = decode_jpeg
        self._mode = "RGB" if data.channels == 3 else "GRAY"
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def batch(self, encoded: Sequence[Encoded]) -> list[Tensor | BadSample]:
        """The pixels of each, or why there are none. On CUDA, valid for who waits for `mark()`."""
        with torch.cuda.stream(self._stream):
            return [
                self._by_cpu(one) if pixels is None else self._crop(pixels, one.box)
                for one, pixels in zip(encoded, self._decoded([one.data for one in encoded]), strict=True)
            ]

    def stack(self, rows: Sequence[Tensor | np.ndarray]) -> Tensor:
        """All rows of a batch on the device, whichever of them came from the CPU."""
        with torch.cuda.stream(self._stream):
            return torch.stack([torch.as_tensor(row).to(self.device) for row in rows])

    def mark(self) -> torch.cuda.Event | None:
        """Passes when all that was asked for so far is done."""
        return self._stream.record_event() if self._stream is not None else None

    def _decoded(self, files: list[bytes]) -> list[Tensor | None]:
        """One call for all; where that fails, one for each: the library does not say which of them it was."""
        raw = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in files]
        try:
            return list(self._decode_jpeg(raw, mode=self._mode, device=self.device))
        except RuntimeError:
            if len(raw) == 1:
                return [None]
        return [pixels for data in files for pixels in self._decoded([data])]

    def _crop(self, pixels: Tensor, box: images.Box) -> Tensor:
        """Antialiased, as on the CPU, but rounded once and not twice."""
        top, left, height, width = box
        cut = pixels[None, :, top : top + height, left : left + width]
        size = (self.data.image_size,) * 2
        if cut.shape[2:] != size:
            cut = interpolate(cut.float(), size=size, mode=self.data.interpolation, antialias=True)
        return cut[0].round().clamp(0, 255).to(torch.uint8)

    def _by_cpu(self, one: Encoded) -> Tensor | BadSample:
        self.refused += 1
        try:
            pixels, _ = images.decode(one.data, self.data.channels)
        except BadSample as error:
            return error
        return torch.from_numpy(images.crop(pixels, one.box, self.data.image_size, self.data.interpolation)).to(
            self.device
        )


def device_decoder(data: Data) -> DeviceDecoder:
    """The decoder that data.decoder nvjpeg asks for, on this process's GPU. Raises UsageError where there is none."""
    fix = "; use --data.decoder cpu"
    if not torch.cuda.is_available():
        raise UsageError(f"--data.decoder nvjpeg needs a CUDA device, and torch sees none here{fix}")
    try:
        decode_jpeg = importlib.import_module("torchvision.io").decode_jpeg
    except (ImportError, AttributeError, RuntimeError) as error:  # RuntimeError: built for another torch
        said = str(error).splitlines()[0]
        raise UsageError(
            f"--data.decoder nvjpeg needs torchvision built for torch {torch.__version__} with CUDA ({said}); install it, or{fix[1:]}"
        ) from None
    return DeviceDecoder(data, torch.device("cuda", torch.cuda.current_device()), decode_jpeg)
