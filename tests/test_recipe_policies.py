"""Which policies commands run on a recipe: the one rule, case by case."""

import pytest

from fmaq import Policy
from fmaq.recipes.explain import RecipeError
from fmaq.recipes.policies import all_policies, emulates, emulating_policy, is_template, one_policy, with_accumulators
from fmaq.recipes.recipe import Recipe

EIGHT, TEN, TWELVE = "M4E3b5 product=M4E3b7", "M5E4b10 product=M5E4b12", "paper12"


def recipe(**keys: object) -> Recipe:
    model = {"callable": "fmaq.recipes.residual_cnn:residual_cnn"}
    return Recipe.parse({"name": "r", "model": model, "data": {"kind": "digits"}, **keys})


def shown(policies: list[Policy]) -> list[str]:
    """Operands and accumulator, in short."""
    return [f"{p.weight or 'float32'} {str(p.accumulator).split()[0]}" for p in policies]


@pytest.mark.parametrize(
    ("keys", "everything", "one"),
    [
        ({}, ["float32 fp32"], "float32 fp32"),
        ({"policy": {"weight": "M4E3"}}, ["M4E3 fp32"], "M4E3 fp32"),
        ({"policy": {"accumulator": EIGHT}}, ["float32 M4E3b5"], "float32 M4E3b5"),
        ({"accumulators": ["fp32", TEN]}, ["float32 fp32", "float32 M5E4b10"], "float32 M5E4b10"),
        (
            {"policy": {"accumulator": EIGHT}, "accumulators": ["fp32", TEN]},
            ["float32 M4E3b5", "float32 fp32", "float32 M5E4b10"],
            "float32 M4E3b5",
        ),
        # listed among the others, the policy's own keeps its place there, and is still the one
        (
            {"policy": {"accumulator": EIGHT}, "accumulators": [TEN, EIGHT]},
            ["float32 M5E4b10", "float32 M4E3b5"],
            "float32 M4E3b5",
        ),
        (
            {"policy": {"accumulator": EIGHT, "weight": "int8"}, "operands": ["M4E3", "float32"]},
            ["M4E3 M4E3b5", "float32 M4E3b5"],
            "M4E3 M4E3b5",
        ),
        (
            {"operands": ["M4E3", "float32"], "accumulators": ["fp32", TEN]},
            ["M4E3 fp32", "M4E3 M5E4b10", "float32 fp32", "float32 M5E4b10"],
            "M4E3 M5E4b10",
        ),
    ],
)
def test_the_rule(keys: dict, everything: list[str], one: str) -> None:
    made = recipe(**keys)
    assert shown(all_policies(made)) == everything
    assert shown([one_policy(made)]) == [one]


def test_an_accumulator_of_the_command_line_is_the_only_one_whatever_the_entries_say() -> None:
    layers = {"stem": {"accumulator": TEN}, "classifier": {"accumulator": "fp32"}, "blocks.*": None}
    made = recipe(policy={"accumulator": EIGHT, "layers": layers}, accumulators=[TEN], operands=["float32", "M4E3"])
    (one, quantized) = all_policies(with_accumulators(made, [TWELVE]))
    assert shown([one, quantized]) == ["float32 M7E4b10", "M4E3 M7E4b10"]
    assert str(one.layers["stem"]["accumulator"]).startswith("M7E4b10")
    assert one.layers["classifier"] == {"accumulator": "fp32"} and one.layers["blocks.*"] is None
    assert one_policy(with_accumulators(made, [TWELVE])) == one


def test_several_of_them_keep_their_order_and_float32_does_not_undo_the_entries() -> None:
    made = with_accumulators(recipe(policy={"layers": {"stem": {"accumulator": TEN}}}), ["fp32", EIGHT, TWELVE])
    found = all_policies(made)
    assert shown(found) == ["float32 fp32", "float32 M4E3b5", "float32 M7E4b10"]
    stems = [str(policy.layers["stem"]["accumulator"]).split()[0] for policy in found]
    assert stems == ["fp32", "M4E3b5", "M7E4b10"]
    assert not emulates(found[0]) and shown([one_policy(made)]) == ["float32 M4E3b5"]


def test_what_was_chosen_for_another_accumulator_is_not_kept() -> None:
    policy = {"accumulator": EIGHT, "layers": {"stem": {"offset": [1] * 16, "gain": 1.5}}}
    assert all_policies(with_accumulators(recipe(policy=policy), [TEN]))[0].layers == {"stem": {}}
    own, other = all_policies(recipe(policy=policy, accumulators=[EIGHT]))  # the list's has no offsets
    assert "offset" in own.layers["stem"] and other.layers == {"stem": {}}


@pytest.mark.parametrize(
    ("policy", "emulated", "template"),
    [
        (Policy(), False, False),
        (Policy(weight="M4E3", layers={"a": None}), False, False),
        (Policy("M7E4"), True, True),
        (Policy(layers={"a": {"accumulator": "M7E4"}}), True, True),
        (Policy(layers={"a": {"products": {0: {"accumulator": TEN}}}}), True, False),
        (Policy(products={"attention_scores": {"accumulator": TEN}}), True, False),
    ],
)
def test_entries_count_too(policy: Policy, emulated: bool, template: bool) -> None:
    assert (emulates(policy), is_template(policy)) == (emulated, template)


def test_a_recipe_without_accumulators_says_how_to_give_one() -> None:
    with pytest.raises(RecipeError, match="the recipe r leaves every sum in float32; name an accumulator, like -a"):
        emulating_policy(recipe(accumulators=["fp32"], policy={"weight": "M4E3"}))
