"""Which dense layers get LoRA: names, `all-linear` or a default, in all blocks, the last K or a list."""

from collections.abc import Sequence

from textlora.config import LoraConfig
from textlora.errors import UsageError

DEFAULT_TARGETS = ("query", "value", "q_lin", "v_lin", "query_proj", "value_proj", "Wqkv", "q", "v", "in_proj", "q_proj", "v_proj")


def resolve_layers(layers: str, count: int) -> list[int]:
    """Block numbers named by `all`, `last:K` or a list such as `0,1,5`, ascending.

    Raises:
        UsageError: it cannot be read, or names a block that is not there.
    """
    if layers == "all":
        return list(range(count))
    kind, _, number = layers.partition(":")
    try:
        if kind == "last":
            chosen = list(range(count))[-int(number) :] if 1 <= int(number) <= count else []
        else:
            chosen = sorted({int(part) for part in layers.split(",")})
    except ValueError as error:
        raise UsageError(f"--layers {layers}: not all, last:K or a list such as 0,1,5") from error
    if not chosen or chosen[0] < 0 or chosen[-1] >= count:
        raise UsageError(f"--layers {layers}: the base model has blocks 0 to {count - 1}")
    return chosen


def resolve_targets(lora: LoraConfig, modules: Sequence[tuple[int, str, tuple[int, int]]], blocks: int) -> list[str]:
    """Full names of the dense layers that get LoRA, in the order of `modules`.

    Args:
        modules: (block, full module name, (out, in)) of every dense layer inside the encoder blocks.
        blocks: how many encoder blocks there are.

    Raises:
        UsageError: a name matches nothing, or r is larger than a chosen layer.
    """
    chosen_blocks = set(resolve_layers(lora.layers, blocks))
    names = lora.target_modules
    ends = lambda full, name: full == name or full.endswith("." + name)
    existing = sorted({_short(full, block) for block, full, _ in modules})
    if names is None:
        names = tuple(name for name in DEFAULT_TARGETS if any(ends(full, name) for _, full, _ in modules))
        if not names:
            raise UsageError("this architecture has no known default for --target-modules", f"name some of: {', '.join(existing)}")
    if names == ("all-linear",):
        picked = [(block, full, shape) for block, full, shape in modules]
    else:
        for name in names:
            if not any(ends(full, name) for _, full, _ in modules):
                raise UsageError(f"--target-modules {name}: matches no dense layer of the encoder blocks", f"there are: {', '.join(existing)}")
        picked = [m for m in modules if any(ends(m[1], name) for name in names)]
    picked = [m for m in picked if m[0] in chosen_blocks]
    if not picked:
        raise UsageError(f"--target-modules with --layers {lora.layers} leaves no layer to adapt")
    for _, full, (out, inner) in picked:
        if lora.r > min(out, inner):
            raise UsageError(f"--r {lora.r}: larger than {full}, which is {out} x {inner}", f"use at most {min(out, inner)}")
    return [full for _, full, _ in picked]


def _short(full: str, block: int) -> str:
    """The part of a module name behind its block number."""
    return full.partition(f".{block}.")[2] or full
