"""The benchmark's groups, end to end on small models: what they hold, never how long they took."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.synthetic import catalogue

pytestmark = pytest.mark.host

LAYERS = {"SD 1.5": 16, "SDXL": 70}


@pytest.fixture(scope="module")
def bench(host: Any) -> Any:
    """The benchmark's modules by name."""

    class Modules:
        def __getattr__(self, name: str) -> Any:
            return host.library(f"ip_adapter.bench.{name}")

    return Modules()


@pytest.fixture(scope="module")
def world(bench: Any) -> Iterator[Any]:
    made = bench.world.World(bench.world.Settings("cpu", "small", 2))
    yield made
    made.let_go()


@pytest.fixture(autouse=True)
def _rounds(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Intervals are tested elsewhere."""
    monkeypatch.setattr(bench.estimates, "DRAWS", 20)


def measure(jobs: Any, world: Any, name: str) -> list[Any]:
    """The rows of the job whose name begins so."""
    found = [job for job in jobs(world) if job.name.startswith(name)]
    assert len(found) == 1, [job.name for job in jobs(world)]
    rows = list(found[0].measure())
    for row in rows:
        json.dumps(row.context)
        for figure in row.figures:
            assert math.isfinite(figure.value)
            assert figure.low is None or figure.low <= figure.value <= figure.high
    return rows


def figures(row: Any) -> dict[str, Any]:
    return {figure.measure: figure for figure in row.figures}


def test_names_of_jobs_are_unique(bench: Any, world: Any) -> None:
    settings = bench.world.Settings("cuda", "real", 4)
    for jobs in bench.__main__.GROUPS.values():
        for one in (world, bench.world.World(settings)):
            names = [job.name for job in jobs(one)]
            assert names and len(names) == len(set(names))


def test_models_have_the_published_layers(bench: Any, host: Any) -> None:
    unets = host.library("ip_adapter.host.unet")
    for family, count in LAYERS.items():
        base = bench.models.base(family, "small")
        assert len(unets.cross_attention_layers(base.model)) == count
        assert all(bool(p.isfinite().all()) for p in base.model.model.parameters())


@pytest.mark.parametrize(
    ("family", "kind", "published"),
    [
        ("SD 1.5", "global", catalogue.global_projection(1024, 768)),
        ("SD 1.5", "plus", catalogue.resampler(1280, 768, 12, 768)),
        ("SD 1.5", "full", catalogue.patch_projection(1280, 768)),
        ("SD 1.5", "faceid-plus", catalogue.face_perceiver(1280, 768)),
        ("SDXL", "global", catalogue.global_projection(1280, 2048)),
        ("SDXL", "plus", catalogue.resampler(1280, 1280, 20, 2048)),
        ("SDXL", "faceid-plus", catalogue.face_perceiver(1280, 2048)),
    ],
)
def test_projections_are_the_published_ones(
    bench: Any, host: Any, family: str, kind: str, published: Any
) -> None:
    spec = bench.models.projection(kind, family, "real")
    projections = host.library("ip_adapter.projections")
    built = projections.build_projection(spec, torch.nn, "meta")
    assert {name: tuple(t.shape) for name, t in built.state_dict().items()} == dict(published)


def test_several_runs_are_open_at_once_and_each_is_its_own(bench: Any, world: Any) -> None:
    """A step is the same, bit for bit, as in a run of its own."""
    base = world.base("SD 1.5")
    scene = bench.sampling.Scene(base, 64, 48, batch=2, guidance=3.0)
    case = bench.steps.Case(("global",), is_masked=True)
    models = [base.model, case.apply(base, 64, 48), base.model.clone()]

    def both(steps: list[Any]) -> list[Any]:
        first = [step(0) for step in steps]
        return [first, [step(3) for step in reversed(steps)][::-1]]

    together = bench.sampling.open_runs(scene, models, both)
    for place, model in enumerate(models):
        alone = bench.sampling.open_runs(scene, [model], lambda s: (s[0](0), s[0](3)))
        assert torch.equal(together[0][place], alone[0])
        assert torch.equal(together[1][place], alone[1])
    assert not torch.equal(together[0][0], together[0][1])
    assert torch.equal(together[0][0], together[0][2])
    assert base.model.model.current_patcher is None


def test_a_step_is_the_samplers_own(bench: Any, world: Any) -> None:
    """One Euler step over the schedule's first sigma to zero gives what the model denoised."""
    import comfy.samplers

    base = world.base("SD 1.5")
    scene = bench.sampling.Scene(base, 64, 64)
    model = bench.steps.Case(("plus",)).apply(base, 64, 64)
    found = bench.sampling.open_runs(scene, [model], lambda steps: steps[0](0))
    sigmas = torch.stack([scene.sigmas()[0], torch.zeros(())])
    noise = scene.noise()
    euler = comfy.samplers.sampler_object("euler")
    out = scene.guider(model).sample(
        noise, torch.zeros_like(noise), euler, sigmas, disable_pbar=True, seed=0
    )
    expected = base.model.model.process_latent_out(found)
    assert torch.allclose(out, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("place", "family"), [("1", "SD 1.5"), ("3", "SD 1.5"), ("5", "SD 1.5")])
def test_steps(bench: Any, world: Any, place: str, family: str) -> None:
    rows = measure(bench.steps.jobs, world, f"{place}:")
    chosen = bench.steps.SETS[int(place) - 1]
    assert len(rows) == 1 + len(chosen.cases)
    control, *others = rows
    assert "control" in control.case and control.figures[0].goal is None
    for row, case in zip(others, chosen.cases, strict=True):
        less, more = row.work
        assert figures(row)["step / step without"].value > 0
        assert 1 < figures(row)["step / the same step less our own code"].value < 10
        if len(case.kinds) == 1:
            assert more.attentions - less.attentions == LAYERS[family]
            assert more.products == less.products, "keys and values are the run's, not the step's"
            assert row.figures[0].goal == 1.01
        assert more.reads - less.reads == int(case.is_scheduled)
        assert more.flops > less.flops


def test_the_image_prompts_own_time_is_all_of_it_and_only_within_them(
    bench: Any, world: Any, host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = host.library("ip_adapter.host.branch").Branch
    add, wait = layer.add, 0.005

    def slow(*args: Any) -> Any:
        time.sleep(wait)
        return add(*args)

    monkeypatch.setattr(layer, "add", slow)
    base = world.base("SD 1.5")
    scene = bench.sampling.Scene(base, 64, 64)
    patched = bench.steps.Case(("global",)).apply(base, 64, 64)
    seconds, ours = bench.sampling.open_runs(
        scene,
        [base.model, patched],
        lambda steps: bench.inside.interleaved(steps, 2, bench.clocks.wall_clock),
    )
    assert (ours[:, 0] == 0).all()
    assert (ours[:, 1] > LAYERS["SD 1.5"] * wait).all() and (ours < seconds).all()
    assert layer.add is slow


def test_the_arithmetic_that_is_added_is_attention_to_the_image_tokens(
    bench: Any, world: Any
) -> None:
    base = world.base("SD 1.5")
    case = bench.steps.Case(("global",))
    scene = bench.sampling.Scene(base, 64, 64)
    less, more = bench.world.count_steps(scene, [base.model, case.apply(base, 64, 64)])
    # widths of 32, 64, 128 on grids of 8 x 8, 4 x 4, 2 x 2, and the middle on 1 x 1
    layers = [(32, 64)] * 5 + [(64, 16)] * 5 + [(128, 4)] * 5 + [(128, 1)]
    rows, tokens = 2, 4  # both sides of guidance
    expected = sum(rows * 2 * 2 * width * places * tokens for width, places in layers)
    assert (more - less).flops == expected


def test_beside_diffusers(bench: Any, world: Any) -> None:
    (row,) = measure(bench.rival.jobs, world, "SD 1.5 64 x 64, plus")
    found = figures(row)
    ours, theirs = found["ours: step / step without"], found["diffusers: step / step without"]
    assert ours.value > 0 and theirs.value > 0
    assert found["our overhead less a third of diffusers'"].goal == 0
    # They project the features and make keys and values in every step; both attend to 16 tokens.
    assert 0 < found["added arithmetic, ours / diffusers'"].value < 1 / 3
    assert 0 < found["added operators, ours / diffusers'"].value < 1


@pytest.mark.parametrize("family", ["SD 1.5", "SDXL"])
def test_diffusers_has_the_very_weights(bench: Any, world: Any, family: str) -> None:
    """Both UNets predict the same noise from the same latent; see the parity tests for adapters."""
    base = world.base(family)
    case = bench.steps.Case(("global",))
    scene = bench.sampling.Scene(base, 64, 64)
    theirs = bench.rival.unet(base)
    given = bench.rival.inputs(base, case, scene)
    rows, time = torch.cat([given["latent"]] * 2), torch.tensor([bench.rival.TIMESTEP] * 2)
    added = {name: value for name, value in given["added"].items() if name != "image_embeds"}
    expected = theirs(rows, time, given["text"], added_cond_kwargs=added, return_dict=False)[0]
    host = base.model.model
    more = {}
    if family == "SDXL":
        sizes = {
            **dict.fromkeys(("height", "width", "target_height", "target_width"), 64),
            **dict.fromkeys(("crop_h", "crop_w"), 0),
        }
        pooled = given["added"]["text_embeds"]
        more["y"] = torch.cat(
            [
                host.encode_adm(pooled_output=one[None], device=torch.device("cpu"), **sizes)
                for one in pooled
            ]
        )
    found = host.diffusion_model(rows, time, context=given["text"], **more)
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-3)
    shared = {tensor.data_ptr() for tensor in host.diffusion_model.parameters()}
    assert all(tensor.data_ptr() in shared for tensor in theirs.parameters())


def test_from_prompt_to_first_step(bench: Any, world: Any) -> None:
    rows = measure(bench.queueing.jobs, world, "SD 1.5, plus")
    assert [row.case for row in rows] == [
        f"SD 1.5, plus, {what} changes" for what in ("nothing", "weight", "reference")
    ]
    assert [figures(row)["encoder runs"].value for row in rows] == [0, 0, 1]
    assert all(figures(row)["encoder runs"].verdict == "met" for row in rows)
    known = __import__("nodes").NODE_CLASS_MAPPINGS
    assert not any(name.startswith(bench.queueing.PREFIX) for name in known)


def test_loading(bench: Any, world: Any, tmp_path: Path) -> None:
    (row,) = measure(bench.loading.jobs, world, "SD 1.5, plus")
    assert figures(row)["time / plain read"].goal == 1.2
    adapter = world.base("SD 1.5").adapter("plus")
    path = bench.models.save(adapter, tmp_path / "a.safetensors")
    plain, ours = bench.loading.plain(path), bench.loading.ours(path)
    assert sum(t.numel() for t in plain) == sum(t.numel() for t in ours)
    assert row.context["bytes"] > sum(t.nbytes for t in plain)


def test_peaks_of_memory(bench: Any, world: Any) -> None:
    rows = measure(bench.remembering.jobs, world, "peak")
    assert len(rows) == len(bench.remembering.CASES)
    for row in rows:
        assert row.context["extra"] >= row.context["needed"], "keys and values must be somewhere"
        assert figures(row)["extra peak / keys, values, masks"].goal == 1


def test_keys_values_and_masks_by_hand(bench: Any, world: Any) -> None:
    base = world.base("SD 1.5")
    scene = bench.sampling.Scene(base, 64, 128)
    widths = [32] * 5 + [64] * 5 + [128] * 6
    plus = 2 * 2 * 16 * sum(widths) * 4  # keys and values, both sides, tokens, float32
    found = bench.remembering.needed(base, bench.steps.Case(("plus", "plus")), scene)
    assert found == 2 * plus
    masked = bench.remembering.needed(base, bench.steps.Case(("plus",), is_masked=True), scene)
    assert masked == plus + 4 * (8 * 16 + 4 * 8 + 2 * 4)


@pytest.mark.parametrize(("name", "goal"), [("queue", 0), ("control", None)])
def test_nothing_stays_after_a_queue(bench: Any, world: Any, name: str, goal: float | None) -> None:
    (row,) = measure(bench.remembering.jobs, world, name)
    stays = figures(row)["tensors that stay after /free"]
    assert stays.verdict == "met", stays
    assert len(row.context["readings"]) == world.settings.prompts
    growth = figures(row)["growth of resident memory"]
    assert growth.goal == goal and growth.unit == "kB per prompt"


@pytest.mark.parametrize(
    ("what", "arithmetic"),
    [("tokens", 1), ("references", 1), ("adapters", 1), ("resolution", 2), ("frames", 1)],
)
def test_scaling(bench: Any, world: Any, what: str, arithmetic: int) -> None:
    (row,) = measure(bench.scaling.jobs, world, what)
    found = figures(row)
    assert found["added arithmetic: exponent"].value == pytest.approx(arithmetic, abs=0.02)
    assert found["added memory: exponent"].value < 2  # one frame needs views, many need copies
    sizes = row.context["sizes"]
    assert row.case.startswith(f"{what} {sizes[0]} to {sizes[-1]}")


def test_training(bench: Any, world: Any) -> None:
    rows = measure(bench.training.jobs, world, "SD 1.5, plus")
    assert figures(rows[0])["time of a step / plain loop"].value > 0
    assert len(rows[0].context["seconds"]) == world.settings.rounds


def test_both_trainings_train_as_many_numbers(bench: Any, world: Any) -> None:
    base = world.base("SD 1.5")
    batch = bench.training.make_batch(base, "plus", 1, 64)
    theirs = bench.training.Theirs(base, "plus", batch)
    ours = bench.training.Ours(base, "plus", batch, "cpu")
    count = sum(p.numel() for p in ours.adapter.parameters() if p.requires_grad)
    assert sum(p.numel() for p in theirs.trained) == count
    before = [p.detach().clone() for p in theirs.trained]
    assert math.isfinite(theirs.step())
    moved = [not torch.equal(a, b) for a, b in zip(before, theirs.trained, strict=True)]
    assert all(moved)


def test_the_command_measures_and_goes_on(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    main, job, row = bench.__main__, bench.world.Job, bench.results.Row
    calls: list[str] = []

    def jobs(world: Any) -> Iterator[Any]:
        assert world.settings.size == "small" and world.settings.rounds == 3
        for name in ("a", "b", "c"):

            def work(name: str = name) -> list[Any]:
                calls.append(name)
                if len(calls) == 2:
                    raise KeyboardInterrupt
                return [row(f"case {name}", (bench.results.Figure("ratio", 1.5, goal=1.0),))]

            yield job(name, work)

    monkeypatch.setattr(main, "GROUPS", dict.fromkeys(main.GROUPS, jobs))
    file, page = tmp_path / "r.json", tmp_path / "p.md"
    given = ["loading", "--size", "small", "--rounds", "3", "--results", str(file)]
    given += ["--device", "cpu", "--page", str(page)]
    assert main.main(given) == 130 and not page.exists()
    assert main.main(given) == 0
    assert calls == ["a", "b", "b", "c"]
    said = capsys.readouterr()
    assert "loading: a: measured before" in said.out
    assert "case c: ratio 1.500, missed" in said.out
    assert page.read_text().count("**missed**") >= 3
    assert main.main([*given, "--again"]) == 0
    assert calls[4:] == ["a", "b", "c"]
    assert main.main([*given[:2], "real", *given[3:]]) == 1
    assert "size: 'small' there, 'real' now" in capsys.readouterr().err
    assert main.main(["loading", "--device", "cuda", "--results", str(file)]) == 1
    assert "cuda is asked for" in capsys.readouterr().err
