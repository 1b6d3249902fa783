"""Which linear layers a block has: one table, read by names, forward pass, calibration, cost, targets and reports.

Light: nothing but the standard library is imported.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Site:
    """One linear layer of a block.

    Attributes:
        kind: its short name, one of `KINDS`.
        path: where it lies in a block, and what the middle of its tensors' names is, e.g. "self_attn.q_proj".
        input: the local name of the input that it reads; sites that read the same one share it.
        rows, columns: attributes of `LlamaConfig` that hold its number of outputs and of inputs.
    """

    kind: str
    path: str
    input: str
    rows: str
    columns: str

    @property
    def name(self) -> str:
        """The last part of its tensors' names before ".weight", e.g. "q_proj"."""
        return self.path.rsplit(".", 1)[1]

    @property
    def sublayer(self) -> str:
        """ "attention" or "mlp"."""
        return "attention" if self.path.startswith("self_attn.") else "mlp"


SITES = (
    Site("q", "self_attn.q_proj", "self_attn.qkv", "query_size", "hidden_size"),
    Site("k", "self_attn.k_proj", "self_attn.qkv", "key_size", "hidden_size"),
    Site("v", "self_attn.v_proj", "self_attn.qkv", "key_size", "hidden_size"),
    Site("o", "self_attn.o_proj", "self_attn.o_proj", "hidden_size", "query_size"),
    Site("gate", "mlp.gate_proj", "mlp.gate_up", "intermediate_size", "hidden_size"),
    Site("up", "mlp.up_proj", "mlp.gate_up", "intermediate_size", "hidden_size"),
    Site("down", "mlp.down_proj", "mlp.down_proj", "hidden_size", "intermediate_size"),
)
"""In the order in which the forward pass meets them, which is the order in which they are listed everywhere."""

BY_KIND = {site.kind: site for site in SITES}
BY_PATH = {site.path: site for site in SITES}

KINDS = tuple(BY_KIND)
"""Kinds of linear layers: q, k, v, o, gate, up, down."""

INPUTS = tuple(dict.fromkeys(site.input for site in SITES))
"""Local names of a block's distinct inputs, in the order in which the forward pass meets them."""


def siblings(kind: str) -> tuple[str, ...]:
    """The kinds that read the same input as `kind`, itself among them.

    Example:
        >>> siblings("k"), siblings("down")
        (('q', 'k', 'v'), ('down',))
    """
    return tuple(site.kind for site in SITES if site.input == BY_KIND[kind].input)


def shared_inputs() -> tuple[tuple[str, ...], ...]:
    """The groups of kinds that read one input, of those inputs that several read.

    Example:
        >>> shared_inputs()
        (('q', 'k', 'v'), ('gate', 'up'))
    """
    groups = (tuple(site.kind for site in SITES if site.input == name) for name in INPUTS)
    return tuple(group for group in groups if len(group) > 1)


def sublayer_of(kind: str) -> str:
    """ "attention" or "mlp"; the latter for a kind that is not known.

    Example:
        >>> sublayer_of("o"), sublayer_of("gate")
        ('attention', 'mlp')
    """
    return BY_KIND[kind].sublayer if kind in BY_KIND else "mlp"


def kind_of_path(path: str) -> str | None:
    """The kind of the site at the end of a name ("model.layers.3.mlp.down_proj", "mlp.down_proj"); None for any other name.

    Example:
        >>> kind_of_path("model.layers.3.mlp.down_proj"), kind_of_path("lm_head")
        ('down', None)
    """
    site = BY_PATH.get(".".join(path.split(".")[-2:]))
    return None if site is None else site.kind
