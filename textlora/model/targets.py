"""Which dense layers get LoRA: names, `all-linear` or a default, in all blocks, the last K or a list."""

from collections.abc import Mapping, Sequence

from torch import nn

from textlora.core.config import LoraConfig
from textlora.core.errors import ModelError, UsageError

DEFAULT_TARGETS = (
    "query",
    "value",
    "q_lin",
    "v_lin",
    "query_proj",
    "value_proj",
    "Wqkv",
    "q",
    "v",
    "in_proj",
    "q_proj",
    "v_proj",
)


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


def resolve_targets(
    lora: LoraConfig,
    modules: Sequence[tuple[int, str, tuple[int, int]]],
    blocks: int,
    others: Mapping[str, tuple[int, int] | None] | None = None,
) -> list[str]:
    """Full names of the dense layers that get LoRA, in the order of `modules`, then of `others`.

    Args:
        modules: (block, full module name, (out, in)) of every dense layer inside the encoder blocks.
        blocks: how many encoder blocks there are.
        others: full name -> (out, in) of dense layers outside the blocks, such as a pooler; None where the
            base has no weights for it.
            They are taken only by their full name: `all-linear` and `dense` mean the blocks.

    Raises:
        UsageError: a name matches nothing, or r is larger than a chosen layer.
    """
    others = others or {}
    chosen_blocks = set(resolve_layers(lora.layers, blocks))
    names = lora.target_modules
    ends = lambda full, name: full == name or full.endswith("." + name)
    existing = sorted({_short(full, block) for block, full, _ in modules})
    if names is None:
        names = tuple(name for name in DEFAULT_TARGETS if any(ends(full, name) for _, full, _ in modules))
        if not names:
            raise UsageError(
                "this architecture has no known default for --target-modules",
                f"name some of: {', '.join(existing)}",
            )
    if names == ("all-linear",):
        picked = [(block, full, shape) for block, full, shape in modules]
    else:
        for name in names:
            if name in others:
                if others[name] is None:
                    raise UsageError(
                        f"--target-modules {name}: the base has no weights for this layer",
                        "it is trained in full, without LoRA",
                    )
            elif not any(ends(full, name) for _, full, _ in modules):
                raise UsageError(
                    f"--target-modules {name}: matches no dense layer of the encoder blocks",
                    f"there are: {', '.join(existing)}",
                )
        picked = [m for m in modules if any(ends(m[1], name) for name in names)]
    chosen = [(full, shape) for block, full, shape in picked if block in chosen_blocks]
    chosen += [(full, shape) for full, shape in others.items() if full in names and shape is not None]
    if not chosen:
        raise UsageError(f"--target-modules with --layers {lora.layers} leaves no layer to adapt")
    for full, (out, inner) in chosen:
        r = lora.rank_of(full)
        if r > min(out, inner):
            raise UsageError(
                f"--r {r}: larger than {full}, which is {out} x {inner}", f"use at most {min(out, inner)}"
            )
    return [full for full, _ in chosen]


def _short(full: str, block: int) -> str:
    """The part of a module name behind its block number."""
    return full.partition(f".{block}.")[2] or full


def find_targets(lora: LoraConfig, net: nn.Module, prefix: str, heads: Sequence[str] | None) -> list[str]:
    """`resolve_targets` on a transformers classifier.

    Args:
        prefix: of the encoder in `net`.
        heads: modules that are trained in full, named without the prefix; None where nothing outside the
            blocks can take LoRA.

    Raises:
        UsageError: as `resolve_targets`.
        ModelError: the encoder has no blocks.
    """
    modules, count = _dense_layers(net, prefix)
    blocks, others = {name for _, name, _ in modules}, {}
    for name, module in net.named_modules():
        if heads is not None and type(module) is nn.Linear and name not in blocks:
            drawn = lies_in(name.removeprefix(prefix + "."), heads)
            others[name] = None if drawn else (module.out_features, module.in_features)
    return resolve_targets(lora, modules, count, others)


def block_lists(net: nn.Module, prefix: str) -> list[str]:
    """Names of the outermost module lists of the encoder that hold its blocks: the largest, and those as long
    as it (XLM has several)."""
    found: dict[str, tuple[int, int]] = {}
    for name, module in net.named_modules():
        if (
            isinstance(module, nn.ModuleList)
            and name.startswith(prefix + ".")
            and not lies_in(name, list(found))
        ):
            found[name] = (sum(p.numel() for p in module.parameters()), len(module))
    if not found:
        raise ModelError(
            f"model type '{net.config.model_type}' has no list of encoder blocks",
            "choose a BERT-like base model",
        )
    _, length = max(found.values())
    return [name for name, (size, count) in found.items() if count == length and size]


def _blocks(name: str, blocks: nn.ModuleList) -> list[str]:
    """Names of the blocks of a list; a group that is only a list itself counts by what is in it (ALBERT,
    Funnel)."""
    names = []
    for key, block in blocks.named_children():
        own = [
            (k, child) for k, child in block.named_children() if next(child.parameters(), None) is not None
        ]
        if isinstance(block, nn.ModuleList):
            names += _blocks(f"{name}.{key}", block)
        elif len(own) == 1 and isinstance(own[0][1], nn.ModuleList):
            names += _blocks(f"{name}.{key}.{own[0][0]}", own[0][1])
        else:
            names.append(f"{name}.{key}")
    return names


def _dense_layers(net: nn.Module, prefix: str) -> tuple[list[tuple[int, str, tuple[int, int]]], int]:
    """(block, full name, (out, in)) of every dense layer in the encoder's blocks, block by block, and how
    many blocks there are."""
    modules, count = [], 0
    dense = [(name, module) for name, module in net.named_modules() if type(module) is nn.Linear]
    for root in block_lists(net, prefix):
        blocks = _blocks(root, net.get_submodule(root))
        count = max(count, len(blocks))
        for i, block in enumerate(blocks):
            modules += [
                (i, name, (m.out_features, m.in_features))
                for name, m in dense
                if name.startswith(block + ".")
            ]
    return sorted(modules, key=lambda item: item[0]), count


def lies_in(name: str, modules: Sequence[str]) -> bool:
    """Whether a module or a tensor is, or lies in, one of the modules."""
    return any(f"{name}.".startswith(module + ".") for module in modules)
