"""Sites for layers that stand alone."""

from peft_vit.backbones import Site


def loose_site(kind: str, rows: tuple[int, int], in_features: int) -> Site:
    """Return a site on rows of a layer that is no part of a model."""
    name = f"blocks.0.attn.{kind}"
    return Site(name, "blocks.0.attn.qkv", rows, 0, kind, "attention", in_features, rows[1] - rows[0], tokens=5)
