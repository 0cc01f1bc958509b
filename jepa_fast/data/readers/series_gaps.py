"""Series with missing values or of unequal length, as several sets of the UCR archive have them. In and out: SeriesFiles.

A series that ends in missing values is a shorter one (the archive writes them so); a missing value elsewhere is a gap.
The archive's own advice (its folder Missing_value_and_variable_length_datasets_adjusted): interpolate gaps linearly, pad
short series at the end with noise of low amplitude. Nothing of it happens unless it is asked for.
"""

import dataclasses

import numpy as np

from jepa_fast.data.readers.series import SeriesFile
from jepa_fast.data.sample import TRUSTED
from jepa_fast.errors import UsageError

NOISE = 1e-3  # of a series' standard deviation: what padding varies by
SEED = 20181104


def regular(
    held: dict[str, SeriesFile], gaps: str, lengths: str, max_bad_share: float
) -> tuple[dict[str, SeriesFile], list[str]]:
    """The files with series of one length and no gaps, and what was done, in sentences.

    gaps: `refuse`, `interpolate` (linearly; from the nearest value at the ends) or `zero`. lengths: `refuse`, `pad` (low
    noise around the series' mean, to the longest of all files) or `cut` (to the shortest). Under `refuse` a share of up
    to max_bad_share stays as it is, for the reader to leave out. Raises UsageError that names the flag.
    """
    held = {name: _padded(part, max(p.samples.shape[2] for p in held.values())) for name, part in held.items()}
    notes = []
    for name, part in held.items():
        readable = np.setdiff1d(np.arange(len(part.samples)), list(part.unread))
        ends = _ends(part.samples[readable])
        longest = max(int(_ends(p.samples).max(initial=0)) for p in held.values())
        short = int((ends < longest).sum())
        gappy = sum(not np.isfinite(x[:, :end]).all() for x, end in zip(part.samples[readable], ends, strict=True))
        allowed = min(max_bad_share * max(len(part.samples), TRUSTED), len(readable) - 1)
        if short > allowed and lengths == "refuse":
            least = int(ends.min())
            raise UsageError(
                f"{name}: {short} of {len(part.samples)} series are shorter than the longest ({least} to {longest} values); "
                "give --data.lengths pad (low noise at the end, as the UCR archive advises) or cut"
            )
        if gappy > allowed and gaps == "refuse":
            raise UsageError(
                f"{name}: {gappy} of {len(part.samples)} series hold a missing or infinite value; "
                "give --data.gaps interpolate (as the UCR archive advises) or zero"
            )
        if short and lengths != "refuse":
            done = f"padded with low noise to {longest}" if lengths == "pad" else "all cut to the shortest"
            notes.append(f"{name}: {short} of {len(part.samples)} series were shorter than {longest} values; {done}")
        if gappy and gaps != "refuse":
            done = "interpolated" if gaps == "interpolate" else "set to zero"
            notes.append(f"{name}: {gappy} of {len(part.samples)} series had missing values; {done}")
    if lengths == "cut":
        least = min(int(_ends(part.samples).min(initial=part.samples.shape[2])) for part in held.values())
        if not least:
            raise UsageError("--data.lengths cut: a series has no value at all; remove it, or give --data.lengths pad")
        held = {name: dataclasses.replace(part, samples=part.samples[:, :, :least]) for name, part in held.items()}
    return {name: _filled(part, gaps, lengths) for name, part in held.items()}, notes


def _padded(part: SeriesFile, length: int) -> SeriesFile:
    """With missing values at the end, up to `length`."""
    missing = length - part.samples.shape[2]
    if not missing:
        return part
    samples = np.pad(part.samples, ((0, 0), (0, 0), (0, missing)), constant_values=np.nan)
    return dataclasses.replace(part, samples=samples)


def _ends(samples: np.ndarray) -> np.ndarray:
    """int64 [n]: values of each series [n, C, L] before the missing ones at its end."""
    there = ~np.isnan(samples).all(1)  # [n, L]
    return (
        np.where(there.any(1), there.shape[1] - there[:, ::-1].argmax(1), 0)
        if there.shape[1]
        else np.zeros(len(there), int)
    )


def _filled(part: SeriesFile, gaps: str, lengths: str) -> SeriesFile:
    samples = part.samples
    bad = [i for i in np.flatnonzero(~np.isfinite(samples).all((1, 2))) if i not in part.unread]
    if not bad or (gaps == "refuse" and lengths == "refuse"):
        return part
    samples = samples.copy()
    rng, ends = np.random.default_rng(SEED), _ends(samples)
    for i in bad:
        for channel in samples[i]:
            values = channel[: ends[i]]
            known = np.isfinite(values)
            if not known.all() and gaps != "refuse":
                if gaps == "zero" or not known.any():
                    values[~known] = 0.0
                else:
                    values[~known] = np.interp(np.flatnonzero(~known), np.flatnonzero(known), values[known])
            if ends[i] < len(channel) and lengths == "pad":
                held = values[np.isfinite(values)]
                mean, std = (held.mean(), held.std()) if len(held) else (0.0, 0.0)
                channel[ends[i] :] = rng.normal(mean, max(NOISE * std, 1e-12), len(channel) - ends[i])
    return dataclasses.replace(part, samples=samples)
