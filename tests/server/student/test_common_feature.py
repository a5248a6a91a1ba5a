"""Common-feature learning: shapes, terms, switches and where gradients go."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from consilience.common.errors import StudentError
from consilience.server.student.common_feature import CommonFeature, CommonFeatureLearning, Weights
from consilience.server.student.mmd import mmd


def drawn(*shape: int, seed: int = 0, kind: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=kind)


def maps(n: int = 4, size: int = 5) -> tuple[Tensor, list[Tensor]]:
    return drawn(n, 6, size, size), [drawn(n, 3, size, size, seed=1), drawn(n, 8, size, size, seed=2)]


@pytest.fixture
def tap() -> CommonFeature:
    return CommonFeature([3, 8], 6, width=4, seed=0)


def test_the_networks_are_those_of_the_paper() -> None:
    made = CommonFeature([3, 8], 6, width=4, seed=0)
    assert {name: tuple(held.shape) for name, held in made.state_dict().items()} == {
        "adaptations.0.0.weight": (8, 3, 1, 1),
        "adaptations.1.0.weight": (8, 8, 1, 1),
        "adaptation.0.weight": (8, 6, 1, 1),
        "extractor.0.body.0.weight": (4, 8, 3, 3),
        "extractor.0.body.2.weight": (4, 4, 3, 3),
        "extractor.0.shortcut.weight": (4, 8, 1, 1),
        "extractor.1.body.0.weight": (4, 4, 3, 3),
        "extractor.1.body.2.weight": (4, 4, 3, 3),
        "extractor.2.body.0.weight": (4, 4, 3, 3),
        "extractor.2.body.2.weight": (4, 4, 3, 3),
        "decoders.0.0.weight": (3, 4, 3, 3),
        "decoders.0.2.weight": (3, 3, 1, 1),
        "decoders.1.0.weight": (8, 4, 3, 3),
        "decoders.1.2.weight": (8, 8, 1, 1),
    }
    assert made.extractor(made.adaptation(drawn(2, 6, 5, 7))).shape == (2, 4, 5, 7)
    assert made.adaptation(drawn(2, 6, 5, 5)).min() == 0


def test_weights_depend_on_the_seed_alone() -> None:
    first, again, other = (CommonFeature([3], 2, width=2, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(held, again[key]) for key, held in first.items())
    assert not all(torch.equal(held, other[key]) for key, held in first.items())


def test_terms_are_their_definitions(tap: CommonFeature) -> None:
    student, teachers = maps()
    apart, lost = tap(student, teachers)
    common = [tap.extractor(adapt(each)) for adapt, each in zip(tap.adaptations, teachers, strict=True)]
    own = tap.extractor(tap.adaptation(student))
    assert apart.item() == pytest.approx(sum(mmd(own, each).item() for each in common), rel=1e-5)
    decoded = [decode(each).detach().numpy() for decode, each in zip(tap.decoders, common, strict=True)]
    expected = sum(np.square(d - t.numpy()).mean() for d, t in zip(decoded, teachers, strict=True))
    assert lost.item() == pytest.approx(expected, rel=1e-5)


def test_vectors() -> None:
    made = CommonFeature([3, 8], 6, width=4, vectors=True, seed=0)
    apart, lost = made(drawn(5, 6), [drawn(5, 3), drawn(5, 8)])
    assert apart > 0
    assert lost > 0
    assert [tuple(held.shape) for held in made.extractor.parameters()] == [(4, 8), (4, 4)]
    with pytest.raises(StudentError, match=r"allowed: \(n, C\)"):
        made(drawn(5, 6, 1, 1), [drawn(5, 3, 1, 1), drawn(5, 8, 1, 1)])


def gradients(made: nn.Module) -> set[str]:
    return {
        name.split(".")[0] for name, held in made.named_parameters() if held.grad is not None and held.grad.abs().sum()
    }


@pytest.mark.parametrize(
    ("weights", "moved", "student_moves"),
    [
        (Weights(1, 10, 10), {"adaptation", "adaptations", "extractor", "decoders"}, True),
        (Weights(1, 10, 0), {"adaptation", "adaptations", "extractor"}, True),
        (Weights(1, 0, 10), {"adaptations", "extractor", "decoders"}, False),
        (Weights(1, 0, 0), set(), False),
    ],
)
def test_gradients_go_where_the_terms_are(
    tap: CommonFeature, weights: Weights, moved: set[str], student_moves: bool
) -> None:
    student, teachers = maps()
    student.requires_grad_()
    soft = torch.tensor(2.0, requires_grad=True)
    found = CommonFeatureLearning({"layer3": tap}, weights)(soft, {"layer3": student}, {"layer3": teachers})
    found.total.backward()
    assert gradients(tap) == moved
    assert (student.grad is not None) == student_moves
    assert soft.grad == 1
    assert (found.mmd > 0) == bool(weights.mmd)
    assert (found.reconstruction > 0) == bool(weights.reconstruction)


def test_mmd_moves_every_teacher_s_projection(tap: CommonFeature) -> None:
    apart, _ = tap(*maps(), Weights(0, 1, 0))
    apart.backward()
    for adapt in tap.adaptations:
        weight = adapt[0].weight  # type: ignore[index]
        assert isinstance(weight, Tensor)
        assert weight.grad is not None
        assert weight.grad.abs().sum() > 0


@pytest.mark.parametrize("weights", [Weights(), Weights(0.5, 2, 3), Weights(0, 1, 1), Weights(0, 0, 0)])
def test_the_total_is_the_weighted_sum_over_taps(weights: Weights) -> None:
    taps = {
        "layer2": CommonFeature([3, 8], 6, width=4, seed=0),
        "layer4.1": CommonFeature([3], 6, width=2, vectors=True, seed=1),
    }
    student, teachers = maps()
    given = ({"layer2": student, "layer4.1": drawn(4, 6)}, {"layer2": teachers, "layer4.1": [drawn(4, 3)]})
    learning = CommonFeatureLearning(taps, weights)
    found = learning(torch.tensor(1.5), *given)
    parts = [tap(given[0][name], given[1][name], weights) for name, tap in taps.items()]
    assert found.mmd.item() == pytest.approx(sum(part[0].item() for part in parts), rel=1e-6)
    assert found.reconstruction.item() == pytest.approx(sum(part[1].item() for part in parts), rel=1e-6)
    assert found.soft.item() == (1.5 if weights.soft else 0)
    expected = (
        weights.soft * 1.5 + weights.mmd * found.mmd.item() + weights.reconstruction * found.reconstruction.item()
    )
    assert found.total.item() == pytest.approx(expected, rel=1e-6)
    assert len(list(learning.parameters())) == sum(len(list(tap.parameters())) for tap in taps.values())


def test_a_term_switched_off_cannot_spoil_the_rest(tap: CommonFeature) -> None:
    student, teachers = maps()
    nothing = torch.tensor(float("nan"))
    found = CommonFeatureLearning({"a": tap}, Weights(0, 1, 1))(nothing, {"a": student}, {"a": teachers})
    assert found.total.isfinite()
    found = CommonFeatureLearning({"a": tap}, Weights(1, 0, 1))(
        torch.ones(()), {"a": student * torch.nan}, {"a": teachers}
    )
    assert found.total.isfinite()


def test_learning_brings_the_features_together() -> None:
    made = CommonFeature([3], 6, width=8, seed=0)
    teacher = drawn(16, 3, 4, 4)
    student = nn.Conv2d(3, 6, 1, bias=False)
    with torch.no_grad():
        student.weight.copy_(drawn(6, 3, 1, 1, seed=3))
    optimizer = torch.optim.Adam([*made.parameters(), *student.parameters()], lr=3e-3)
    history = []
    for _ in range(40):
        apart, lost = made(student(teacher), [teacher])
        optimizer.zero_grad()
        (apart + lost).backward()
        optimizer.step()
        history.append((apart.item(), lost.item()))
    assert history[-1][0] < 0.9 * history[0][0]
    assert history[-1][1] < 0.9 * history[0][1]


def test_gradcheck() -> None:
    made = CommonFeature([2], 2, width=2, bandwidths=(0.5, 1.0), seed=3).double()
    student, teacher = (drawn(3, 2, 3, 3, seed=s, kind=torch.float64).requires_grad_() for s in (0, 1))
    assert torch.autograd.gradcheck(lambda s, t: torch.stack(made(s, [t])), (student, teacher), atol=1e-6)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision(kind: torch.dtype) -> None:
    made = CommonFeature([3, 8], 6, width=4, seed=0)
    student, teachers = maps()
    exact = made(student, teachers)
    found = made.to(kind)(student.to(kind), [each.to(kind) for each in teachers])
    assert [each.dtype for each in found] == [torch.float32] * 2
    assert [each.item() for each in found] == pytest.approx([each.item() for each in exact], rel=0.1)


def test_autocast(tap: CommonFeature) -> None:
    student, teachers = maps()
    exact = tap(student, teachers)
    with torch.autocast("cpu", torch.bfloat16):
        found = tap(student, teachers)
    assert [each.dtype for each in found] == [torch.float32] * 2
    assert [each.item() for each in found] == pytest.approx([each.item() for each in exact], rel=0.1)


@pytest.mark.parametrize("size", [(3, 3), (5, 2), (8, 8)])
def test_unequal_sizes_are_brought_to_one(size: tuple[int, int]) -> None:
    made = CommonFeature([3, 8], 6, width=4, size=size, seed=0)
    student, teachers = drawn(4, 6, 5, 5), [drawn(4, 3, 2, 9, seed=1), drawn(4, 8, 4, 4, seed=2)]
    apart, lost = made(student, teachers)
    assert apart > 0
    assert lost > 0
    equal = CommonFeature([3, 8], 6, width=4, seed=0)

    def resized(features: Tensor) -> Tensor:
        """Each direction by itself: one row or column of blocks at a time, in another way than the product."""
        for axis, wanted in zip((2, 3), size, strict=True):
            rows = features.moveaxis(axis, -1)
            flat = rows.reshape(-1, 1, rows.shape[-1])
            if wanted < flat.shape[-1]:
                flat = F.adaptive_avg_pool1d(flat, wanted)
            elif wanted > flat.shape[-1]:
                flat = F.interpolate(flat, wanted, mode="linear", align_corners=False)
            features = flat.reshape(*rows.shape[:-1], wanted).moveaxis(-1, axis)
        return features

    expected = equal(resized(student), [resized(each) for each in teachers])
    assert [apart.item(), lost.item()] == pytest.approx([each.item() for each in expected], rel=1e-4)


def test_sizes_are_averaged_down_and_interpolated_up() -> None:
    made = CommonFeature([1], 1, width=1, size=(2, 4), seed=0)
    image = torch.arange(8.0).reshape(1, 1, 4, 2)
    down_and_up = made.brought(image)
    assert down_and_up.tolist() == [[[[1, 1.25, 1.75, 2], [5, 5.25, 5.75, 6]]]]
    same = drawn(1, 1, 2, 4)
    assert torch.equal(made.brought(same), same)


def test_unequal_sizes_without_a_size(tap: CommonFeature) -> None:
    with pytest.raises(StudentError, match=r"\[\(5, 5\), \(5, 5\), \(4, 4\)\]; without a declared size"):
        tap(maps()[0], [maps()[1][0], drawn(4, 8, 4, 4)])


def test_one_sample(tap: CommonFeature) -> None:
    apart, lost = tap(*maps(n=1))
    assert 0 <= apart < float("inf")
    assert lost > 0


@pytest.mark.parametrize(
    "change",
    [
        lambda s, t: (s[:0], [each[:0] for each in t]),
        lambda s, t: (s[:3], t),
        lambda s, t: (s, t[:1]),
        lambda s, t: (s, t[::-1]),
        lambda s, t: (s[:, :5], t),
        lambda s, t: (s.flatten(1), t),
        lambda s, t: (s[..., :0], [each[..., :0] for each in t]),
    ],
)
def test_features_that_do_not_fit(tap: CommonFeature, change: object) -> None:
    with pytest.raises(StudentError, match=r"allowed: \(n, C, H, W\) with one sample or more.*\[6, 3, 8\] channels"):
        tap(*change(*maps()))  # type: ignore[operator]


def test_a_tap_that_is_missing(tap: CommonFeature) -> None:
    with pytest.raises(StudentError, match="tap layer2 are missing"):
        CommonFeatureLearning({"layer2": tap})(torch.ones(()), {}, {"layer2": maps()[1]})


@pytest.mark.parametrize("weight", [-1, float("nan"), float("inf")])
def test_weights_that_are_none(weight: float) -> None:
    with pytest.raises(StudentError, match=f"Weight mmd of common-feature learning is {weight}"):
        Weights(mmd=weight)


@pytest.mark.parametrize(
    "wrong", [{"teachers": []}, {"student": 0}, {"width": 0}, {"size": (0, 3)}, {"bandwidths": (1.0, 0.0)}]
)
def test_spaces_that_are_none(wrong: dict[str, object]) -> None:
    with pytest.raises(StudentError, match="A common space needs one teacher or more"):
        CommonFeature(**{"teachers": [3], "student": 2, "seed": 0} | wrong)  # type: ignore[arg-type]


def test_a_teacher_that_told_some_samples_is_compared_with_those(tap: CommonFeature) -> None:
    student, teachers = maps(5)
    rows = torch.tensor([4, 1, 2])
    found = tap(student, [teachers[0], teachers[1][rows]], rows=[None, rows])
    first, second = (
        CommonFeature([3], 6, width=4, seed=0),
        CommonFeature([8], 6, width=4, seed=0),
    )
    for number, made in enumerate((first, second)):
        made.adaptation, made.extractor = tap.adaptation, tap.extractor
        made.adaptations[0], made.decoders[0] = tap.adaptations[number], tap.decoders[number]
    pairs = zip(first(student, teachers[:1]), second(student[rows], [teachers[1][rows]]), strict=True)
    expected = [one + other for one, other in pairs]
    assert [float(each.detach()) for each in found] == pytest.approx([float(each.detach()) for each in expected])
    nothing = tap(student, [teachers[0], teachers[1][:0]], rows=[None, rows[:0]])
    alone = first(student, teachers[:1])
    assert [each.item() for each in nothing] == pytest.approx([each.item() for each in alone])


def test_rows_and_features_of_unequal_number(tap: CommonFeature) -> None:
    student, teachers = maps(5)
    with pytest.raises(StudentError, match="have shapes"):
        tap(student, teachers, rows=[None, torch.tensor([1, 2])])


@pytest.mark.parametrize("vectors", [False, True])
def test_normalised_networks_do_not_depend_on_the_scale_of_features(vectors: bool) -> None:
    made = CommonFeature([3], 6, width=4, normalise=True, vectors=vectors, seed=0)
    student, teacher = (drawn(8, 6), drawn(8, 3, seed=1)) if vectors else (drawn(8, 6, 4, 4), drawn(8, 3, 4, 4, seed=1))
    small, large = made(student, [teacher])[0], made(100 * student, [100 * teacher])[0]
    assert small.item() == pytest.approx(large.item(), rel=1e-3)
    plain = CommonFeature([3], 6, width=4, vectors=vectors, seed=0)
    assert sum("running_mean" in name for name in plain.state_dict()) == 0
    assert sum("running_mean" in name for name in made.state_dict()) == (4 if vectors else 3 + 7)
