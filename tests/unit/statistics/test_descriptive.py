from peft_vit.base.statistics import spearman


def test_constant_lists_have_no_order() -> None:
    assert spearman([1, 1, 1], [1, 2, 3]) is spearman([], []) is None
