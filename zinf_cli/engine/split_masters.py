"""Split masters: the fp32 master of a bf16 parameter as the parameter itself and 17 bits more.

Forward and backward compute with the parameter, which is the master rounded to nearest even. The master is the
parameter's bits, less one if it was rounded up, followed by the master's lower half. So 16 bits are kept beside the
parameter, the *remainder*, and one bit that tells whether it was rounded up. The remainder alone does not tell: at a
tie, rounding to nearest even goes up from an odd upper half and down from an even one, to the same parameter.

That bit costs nothing. It lies in the sign of a field that is never negative, the *carrier*: AdamW's mean of squares.
`join` takes it out before the update, and `split` puts it back.

Every fp32 value comes back with its bits, infinities, zeros of both signs and denormals among them. Of a NaN, a NaN
comes back. A master that rounds to infinity has infinity as its parameter, as any cast gives it.

An accelerator takes as long as its memory traffic. There operations take integers of several widths as they are, which
moves 68 bytes for an element to join it and to split it, instead of 102. On a CPU that takes half as long again, since
torch has no vector code for operands of several dtypes.
"""

from __future__ import annotations

import torch

from zinf_cli.tiers.streams import streams_of

_SIGN = -(2**31)
_HALF = 2**16


def join(param: torch.Tensor, remainder: torch.Tensor, carrier: torch.Tensor) -> torch.Tensor:
    """The masters (fp32) of `param` (bf16), `remainder` (int16) and `carrier` (fp32), all 1-D and of one length.

    The carrier's sign is taken out of it.
    """
    master = remainder.view(torch.uint16).to(torch.int32)
    if streams_of(param.device).on_cpu:
        upper = param.view(torch.int16).to(torch.int32)
        upper.add_(carrier.view(torch.int32) >> 31)  # less one where the sign is set
    else:
        upper = torch.add(param.view(torch.int16), torch.signbit(carrier), alpha=-1)
    master.add_(upper, alpha=_HALF)
    carrier.abs_()
    return master.view(torch.float32)


def split(master: torch.Tensor, param: torch.Tensor, remainder: torch.Tensor, carrier: torch.Tensor) -> None:
    """Fill `param` and `remainder`, and set the sign of `carrier`, which has none: see `join`."""
    param.copy_(master)
    bits = master.view(torch.int32)
    remainder.copy_(bits)  # their lower half
    # less than zero where it was rounded up
    if streams_of(param.device).on_cpu:
        beyond = bits - param.float().view(torch.int32)
        carrier.view(torch.int32).bitwise_or_(beyond.bitwise_and_(_SIGN))
    else:
        carrier.copysign_(torch.add(bits, param.view(torch.int16), alpha=-_HALF))
