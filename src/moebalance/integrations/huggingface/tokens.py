"""Which tokens are real, and where one sequence ends and the next begins.

A router sees rows of hidden states; which of them are padding is known to the modules around it.
The sources are asked in this order, and the first that knows is believed:

1. an `attention_mask` of two axes, also one that numbers packed sequences 1, 2, …;
2. a mask of three or four axes, or a dict of them by layer type: a token that does not see itself
   is padding;
3. in a decoder that follows an encoder: `labels`, where -100 is padding;
4. `cu_seq_lens_q`: tokens behind its last entry are padding;
5. the padding token at the ends of rows, where `labels`, if there are some, say -100 too;
6. `labels` of -100 at the end of a row, in a model without a padding token.

Where none of them is there, all tokens are counted, with a warning. Whatever a mask says, tokens at
the end of a row are padding where all have position 0 and label -100: LLaMA-Factory fills its packs
so, under a mask of ones.

Packed sequences in one row are told apart by `cu_seq_lens_q`, `seq_idx`, `position_ids`, or the
masks of 1 and 2.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

Named = Mapping[str, Any]
"""Arguments of one call, by name."""

_IGNORED = -100


class Layout(NamedTuple):
    """The tokens of one stack of layers.

    Attributes:
        mask: (T,) True for real tokens; None if all are.
        rows: B, of T / B tokens each.
        starts: (T,) True where a sequence begins; None where each row is one.
        images: (T,) True for tokens that go to experts for images; None if there are none.
        known: whether anything said which tokens are real.
    """

    mask: Bool[Tensor, "T"] | None = None
    rows: int = 1
    starts: Bool[Tensor, "T"] | None = None
    images: Bool[Tensor, "T"] | None = None
    known: bool = True

    def part(self, *, images: bool) -> "Layout":
        """The layout of the tokens that go to the experts for images, or of all others."""
        if self.images is None:
            return self
        rows = torch.arange(len(self.images), device=self.images.device)
        starts = rows % (len(self.images) // self.rows) == 0
        starts = starts if self.starts is None else starts | self.starts
        # The number of its sequence, of each token: what is left out may hold a sequence's start.
        segment = starts.cumsum(0)[self.images == images]
        starts = segment != torch.cat([segment.new_zeros(1), segment])[:-1]
        mask = None if self.mask is None else self.mask[self.images == images]
        return Layout(mask, 1, starts)


class Packing(NamedTuple):
    """Tokens laid out anew, one sequence a row.

    Attributes:
        places: (N · L,) the token at each place, 0 where there is none.
        valid: (N · L,) False where there is none.
        sequences: N.
    """

    places: Int[Tensor, "cells"]
    valid: Bool[Tensor, "cells"]
    sequences: int


class Source(NamedTuple):
    """A module's arguments, and how its names for a stack's tokens begin.

    Attributes:
        given: the arguments.
        prefix: "decoder_" where a model of encoder and decoder is given both.
    """

    given: Named
    prefix: str = ""

    def get(self, name: str) -> Any:
        """The argument, or None."""
        return self.given.get(self.prefix + name)


def layout(
    sources: Sequence[Source],
    *,
    pad: int | None,
    decodes: bool = False,
    packed: bool = False,
) -> Layout:
    """Lay out the tokens of one stack.

    Args:
        sources: arguments of the stack, then of the modules around it, innermost first.
        pad: the padding token; None if the model has none.
        decodes: whether the stack is the decoder behind an encoder.
        packed: whether to look for several sequences in a row.
    """
    shape = _shape(sources)
    if shape is None:
        mask = next(_tensors(sources, "attention_mask", dims=(2,)), None)
        return Layout(None if mask is None else mask.reshape(-1).bool())
    batch, length = shape
    masks = _Masks(sources, batch, length)
    real = masks.real()
    if real is None and decodes:
        labels = _fitting(sources, "labels", batch, length, plain=True)
        real = None if labels is None else labels != _IGNORED
    known = real is not None
    if real is None:
        real, known = _by_content(sources, batch, length, pad, decodes=decodes)
    filled = _filled(sources, batch, length)
    if filled is not None:
        real = ~filled if real is None else real & ~filled.to(real.device)
    images = _fitting(sources, "moe_mm_token_type_ids", batch, length)
    starts = _starts(sources, masks, batch, length) if packed else None
    return Layout(
        _flat_unless_all(real),
        batch,
        None if starts is None else starts.reshape(-1),
        None if images is None else images.reshape(-1).bool(),
        known,
    )


def pack(layout: Layout) -> Packing:
    """Lay tokens out one sequence a row, without padding between them.

    >>> pack(Layout(None, 1, torch.tensor([True, False, True]))).places.view(2, 2)
    tensor([[0, 1],
            [2, 0]])
    """
    assert layout.starts is not None
    tokens = torch.arange(len(layout.starts), device=layout.starts.device)
    segment = layout.starts.cumsum(0)
    if layout.mask is not None:
        tokens, segment = tokens[layout.mask], segment[layout.mask]
    _, segment, lengths = torch.unique_consecutive(segment, return_inverse=True, return_counts=True)
    if not len(lengths):
        none = torch.zeros(1, dtype=torch.long, device=tokens.device)
        return Packing(none, none.bool(), 1)
    longest, ends = int(lengths.max()), lengths.cumsum(0)
    place = torch.arange(len(tokens), device=tokens.device) - (ends - lengths)[segment]
    cells = segment * longest + place
    index = tokens.new_zeros(len(lengths) * longest)
    index[cells] = tokens
    valid = torch.zeros_like(index, dtype=torch.bool)
    valid[cells] = True
    return Packing(index, valid, len(lengths))


class _Masks:
    """The first mask that fits, of two axes or of more."""

    def __init__(self, sources: Sequence[Source], batch: int, length: int) -> None:
        self.flat: Tensor | None = None
        self.visible: Tensor | None = None
        for mask in _tensors(sources, "attention_mask", dims=(2,)):
            if mask.shape[0] == batch and mask.shape[1] >= length:
                # A prefix or a cache makes the mask longer than what is routed, at its start.
                self.flat = mask[:, -length:]
                return
        for mask in _tensors(sources, "attention_mask", dims=(3, 4)):
            if mask.shape[0] == batch and mask.shape[-2] == length <= mask.shape[-1]:
                first = mask if mask.dim() == 3 else mask[:, 0]
                self.visible = _visible(first[..., -length:])
                return

    def real(self) -> Tensor | None:
        if self.flat is not None:
            return self.flat.bool()
        if self.visible is not None:
            return self.visible.diagonal(dim1=-2, dim2=-1)
        return None

    def starts(self) -> Tensor | None:
        """Where a token does not see the one before it, or has another number."""
        if self.flat is not None:
            if self.flat.is_floating_point() or self.flat.dtype == torch.bool:
                return None
            before, own = self.flat[:, :-1], self.flat[:, 1:]
            return _first_and((own != before) & (own != 0) & (before != 0))
        if self.visible is not None:
            return _first_and(~self.visible.diagonal(offset=-1, dim1=-2, dim2=-1))
        return None


def _visible(mask: Tensor) -> Tensor:
    """Who sees whom, of a mask that says so by 1, by True, or by 0 where others are −∞."""
    if not mask.is_floating_point():
        return mask != 0
    # Without a branch on values, for which a GPU would have to be waited for.
    return torch.where(mask.max() > 0, mask > 0, mask > torch.finfo(mask.dtype).min / 2)


def _by_content(
    sources: Sequence[Source], batch: int, length: int, pad: int | None, *, decodes: bool
) -> tuple[Tensor | None, bool]:
    """Real tokens by what the tokens and labels are, and whether that says anything."""
    labels = _fitting(sources, "labels", batch, length, plain=True)
    ids = _fitting(sources, "input_ids", batch, length)
    ends = next(_tensors(sources, "cu_seq_lens_q", dims=(1,)), None)
    real: Tensor | None = None
    if ends is not None:
        places = torch.arange(batch * length, device=ends.device)
        real = (places < ends[-1]).view(batch, length)
    if pad is not None and ids is not None:
        filler = ids == pad
        if labels is not None:
            filler = filler & (labels == _IGNORED)
        # What a decoder starts with is often the padding token itself.
        ahead = filler & False if decodes else _leading(filler)
        padding = ahead | _leading(filler.flip(1)).flip(1)
    elif labels is not None:
        padding = _leading((labels == _IGNORED).flip(1)).flip(1)
        # A row without any label says nothing of its padding.
        padding = padding & ~padding.all(dim=1, keepdim=True)
    else:
        # One row alone has nothing to be padded to.
        return real, real is not None or batch == 1
    return ~padding if real is None else real & ~padding.to(real.device), True


def _filled(sources: Sequence[Source], batch: int, length: int) -> Tensor | None:
    """The end of a row where no token has a position or a label, if both are given."""
    labels = _fitting(sources, "labels", batch, length, plain=True)
    places = _fitting(sources, "position_ids", batch, length)
    if labels is None or places is None:
        return None
    filled = _leading(((places == 0) & (labels == _IGNORED).to(places.device)).flip(1)).flip(1)
    return filled & ~filled.all(dim=1, keepdim=True)


def _starts(sources: Sequence[Source], masks: _Masks, batch: int, length: int) -> Tensor | None:
    ends = next(_tensors(sources, "cu_seq_lens_q", dims=(1,)), None)
    if ends is not None:
        starts = torch.zeros(batch * length + 1, dtype=torch.bool, device=ends.device)
        starts[ends.long()] = True
        starts[0] = True
        return starts[:-1].view(batch, length)
    numbers = _fitting(sources, "seq_idx", batch, length)
    if numbers is not None:
        return _first_and(numbers[:, 1:] != numbers[:, :-1])
    places = _fitting(sources, "position_ids", batch, length)
    if places is not None:
        return _first_and(places[:, 1:] != places[:, :-1] + 1)
    return masks.starts()


def _first_and(rest: Tensor) -> Tensor:
    """Starts of a batch of rows: the first token of each, and these among the others."""
    return torch.cat([rest.new_ones(len(rest), 1), rest], dim=1)


def _leading(flags: Tensor) -> Tensor:
    """The run of True that each row begins with."""
    return flags.long().cumprod(dim=1).bool()


def _flat_unless_all(real: Tensor | None) -> Tensor | None:
    """(T,), or None if all are real, where it costs nothing to know."""
    if real is None:
        return None
    cheap = real.device.type == "cpu" and not torch.compiler.is_compiling()
    return None if cheap and bool(real.all()) else real.reshape(-1)


def _shape(sources: Sequence[Source]) -> tuple[int, int] | None:
    """(B, S) of the innermost tokens that are told."""
    for source in sources:
        for name, axes in (("input_ids", 2), ("inputs_embeds", 3), ("hidden_states", 3)):
            given = source.get(name)
            if isinstance(given, Tensor) and given.dim() == axes:
                return given.shape[0], given.shape[1]
    return None


def _fitting(
    sources: Sequence[Source], name: str, batch: int, length: int, *, plain: bool = False
) -> Tensor | None:
    """The innermost argument of this name that has one entry a token."""
    for source in sources:
        given = source.given.get(name) if plain else source.get(name)
        if isinstance(given, Tensor) and given.shape == (batch, length):
            return given
    return None


def _tensors(sources: Sequence[Source], name: str, *, dims: tuple[int, ...]) -> Iterator[Tensor]:
    """Arguments of this name with so many axes, innermost first; of a dict full attention first."""
    for source in sources:
        given = source.get(name)
        held = given.values() if isinstance(given, Mapping) else (given,)
        if isinstance(given, Mapping) and "full_attention" in given:
            held = (given["full_attention"], *held)
        for each in held:
            if isinstance(each, Tensor) and each.dim() in dims:
                yield each
