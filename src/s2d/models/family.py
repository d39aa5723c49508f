"""The contract of a model family: the names of its blocks and projections; all other code asks the family.

A family is one file in this folder that calls `register_family`; every module of the folder is imported when families
are first asked for, so adding the file is all there is to do.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from torch import nn

from s2d.registry import Registry
from s2d.targets.weights import clean_name

Modality: TypeAlias = Literal["text", "vision", "multimodal", "causal-lm"]
NormPosition: TypeAlias = Literal["pre", "post"]
Loader: TypeAlias = "Callable[[str, dict[str, Any]], tuple[nn.Module, Any, Any]]"
Maker: TypeAlias = "Callable[[str], tuple[nn.Module, Any, Any]]"

ROLES: dict[str, str] = {
    "embedding": "a table of token, position or type vectors",
    "patch_embed": "pixels to the first token vectors",
    "patch_merge": "neighbouring tokens to one, between stages",
    "norm_embed": "the norm right after (or on) the embeddings, before the first block",
    "norm1": "the attention's norm: feeds q, k, v (pre) or follows proj and feeds fc1 (post)",
    "q": "query projection",
    "k": "key projection",
    "v": "value projection",
    "qkv": "query, key and value in one weight",
    "kv": "key and value in one weight",
    "proj": "the attention's output projection",
    "norm2": "the MLP's norm: feeds fc1 (pre) or follows fc2 and feeds the next block's q, k, v (post)",
    "fc1": "the MLP's first linear (with a gate: the ungated 'up' half, or both halves in one weight)",
    "gate": "the MLP's gate, where it is a weight of its own",
    "activation": "the MLP's non-linearity",
    "fc2": "the MLP's second linear, back to the model's width",
    "norm_inner": "a norm inside attention (on q or k), inside the MLP, or at the merging of tokens",
    "norm_final": "the norm after the last block",
    "pooler": "tokens to one vector",
    "head": "from the model's width to its answer: classes, vocabulary, a shared embedding space",
}

# Heads that task models and the libraries put on top of any family.
_COMMON_ROLES: tuple[tuple[str, str], ...] = (
    (r"(?:^|\.)(?:head|classifier|cls_classifier|distillation_classifier|score|lm_head)(?:\.fc)?$", "head"),
)


@dataclass(frozen=True)
class Family:
    """How the parts of a kind of model are found.

    Attributes:
        name: Short name, e.g. ``"bert"``.
        modality: What the models read.
        norm_position: ``"pre"`` (the norm feeds the sublayer) or ``"post"`` (it follows the residual sum).
        models: Regular expressions, each matched in full against ``module.ClassName`` (``timm.models.eva.Eva``). A
            model belongs to the family when it, or the outermost of its parts that any family knows, is of such a
            class.
        roles: ``(regular expression, role)`` pairs searched in module names, first match wins; roles are the keys of
            `ROLES`.
        block: Regular expression, searched in module names, that is true of every transformer block and nothing else.
    """

    name: str
    modality: Modality
    norm_position: NormPosition
    models: tuple[str, ...]
    roles: tuple[tuple[str, str], ...]
    block: str

    def knows(self, module: nn.Module) -> bool:
        """Whether this very module is of one of the family's model classes (its children are not looked at)."""
        name = f"{type(module).__module__}.{type(module).__name__}"
        return any(re.fullmatch(pattern, name) for pattern in self.models)

    def matches(self, model: nn.Module) -> bool:
        """Whether the model, or one on which it is built, belongs to this family."""
        return family_of(model) is self

    def role(self, module_name: str) -> str | None:
        """The role of a module by its dotted name, or None for one without a role (containers, dropout)."""
        name = clean_name(module_name)
        return next((role for pattern, role in self.roles + _COMMON_ROLES if re.search(pattern, name)), None)

    def blocks(self, model: nn.Module) -> dict[str, nn.Module]:
        """The transformer blocks by name, in forward order (towers one after the other)."""
        return {name: module for name, module in model.named_modules() if re.search(self.block, clean_name(name))}

    def attentions(self, model: nn.Module) -> dict[str, nn.Module]:
        """The attention modules by name: those that hold a projection of queries, or torch's own."""
        found: dict[str, nn.Module] = {}
        for name, module in model.named_modules():
            if "_quantizer" in name or self.role(name) not in ("q", "qkv"):
                continue
            if isinstance(module, nn.MultiheadAttention):
                found[name] = module
            elif "weight" in module._parameters:
                owner = name.rpartition(".")[0]
                found[owner] = model.get_submodule(owner)
        return found


_FAMILIES: Registry[Family] = Registry("family", "s2d.models")
_LOADERS: Registry[Loader] = Registry("loader", "s2d.models")
_MAKERS: Registry[Maker] = Registry("maker", "s2d.models")
# ``@register_loader(PREFIX)``: ``load("PREFIX:NAME")`` calls the function with the name after the colon and a
# dictionary with ``revision`` and ``trust_remote_code``. It returns the model, its tokenizer or None, and its image
# processor or None. ``@register_random(PREFIX)`` is the same for ``load("new:PREFIX:NAME")``, a library's model with
# random weights; the function gets the name after the second colon alone.
register_loader, register_random = _LOADERS.register, _MAKERS.register
FALLBACK = "generic"


def register_family(family: Family) -> Family:
    """Make a family known; each name once, each role one of `ROLES`."""
    unknown = {role for _, role in family.roles} - set(ROLES)
    assert not unknown, f"family {family.name} uses unknown roles {unknown}"
    return _FAMILIES.add(family.name, family)


def makers() -> dict[str, Maker]:
    """Every maker of models with random weights by its prefix."""
    return _MAKERS.all()


def families() -> dict[str, Family]:
    """Every known family by name."""
    return _FAMILIES.all()


def loaders() -> dict[str, Loader]:
    """Every loader by its prefix."""
    return _LOADERS.all()


def family_of(model: nn.Module) -> Family:
    """The family of a model, `generic` when none is known.

    Looks from the outside in, so a classifier built on a BERT is of the BERT family, and a model that joins two known
    towers can have a family of its own.
    """
    known = families()
    for module in model.modules():
        for family in known.values():
            if family.knows(module):
                return family
    return known[FALLBACK]
