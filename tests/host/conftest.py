"""A nano SD 1.5 in the real host, and image prompts to apply to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from miniature import family
from tests import host_process
from tests.synthetic.models import ADAPTER_BASE, ADAPTER_PLUS, CHECKPOINT

SIZE = (8, 8)


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    """The host executes nodes in inference mode."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="session")
def host() -> host_process.Host:
    # The nano model's kernels are so small that a second thread costs more than it does.
    torch.set_num_threads(1)
    return host_process.start()


@pytest.fixture(scope="session")
def model(host: host_process.Host, model_files: Path) -> Any:
    """A MODEL without any patch."""
    import comfy.sd

    with torch.inference_mode():
        return comfy.sd.load_checkpoint_guess_config(
            str(model_files / CHECKPOINT), output_vae=False, output_clip=False
        )[0]


@pytest.fixture(scope="session")
def base_adapter(host: host_process.Host, model_files: Path) -> Any:
    return host.library("ip_adapter.host.adapters").load(model_files / ADAPTER_BASE)


@pytest.fixture(scope="session")
def plus_adapter(host: host_process.Host, model_files: Path) -> Any:
    return host.library("ip_adapter.host.adapters").load(model_files / ADAPTER_PLUS)


@pytest.fixture(scope="module")
def miniature_model(registered: Any) -> Any:
    """The miniature's MODEL, without any patch: a UNet of seven layers."""
    import comfy.sd

    with torch.inference_mode():
        return comfy.sd.load_checkpoint_guess_config(
            str(family.BASE), output_vae=False, output_clip=False
        )[0]


@pytest.fixture(scope="module")
def miniature_apply(host: host_process.Host) -> Applier:
    """Random image prompts by the miniature's global adapter."""
    adapters = host.library("ip_adapter.host.adapters")
    return Applier(host, adapters.load(family.ADAPTERS / "miniature_global.safetensors"))


def project(host: host_process.Host, adapter: Any, **features: Any) -> Tensor:
    """Run an adapter's projection on features: ``image=``, ``face=``, ..."""
    given = host.library("ip_adapter.projections").Features(**features)
    return adapter.module.image_tokens(given)


@dataclass(frozen=True)
class Applier:
    """Applies random image prompts, the same for the same seed."""

    host: host_process.Host
    adapter: Any

    def prompt(self, seed: int = 0, count: int = 1) -> Any:
        tokens = draw(
            count + 1,
            self.adapter.spec.projection.tokens,
            self.adapter.spec.projection.width,
            seed=seed,
        )
        return self.host.library("ip_adapter.prompt").from_tokens(
            tokens[1:], tokens[:1], self.adapter.fingerprint, self.adapter.label
        )

    def __call__(self, model: Any, seed: int = 0, **influence: Any) -> Any:
        patching = self.host.library("ip_adapter.host.patching")
        return patching.apply(model, self.adapter, self.prompt(seed), **influence)[0]


@pytest.fixture(scope="session")
def apply(host: host_process.Host, base_adapter: Any) -> Applier:
    return Applier(host, base_adapter)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def text(seed: int) -> list[Any]:
    """A CONDITIONING of random text states."""
    return [[draw(1, 77, 768, seed=1000 + seed), {}]]


@dataclass(frozen=True)
class Sampler:
    """The host's sampler on the nano model."""

    def __call__(
        self,
        model: Any,
        *,
        steps: int = 2,
        cfg: float = 4.0,
        noise: Tensor | None = None,
        positive: Any = None,
        negative: Any = None,
        sampler: str = "euler",
        **kwargs: Any,
    ) -> Tensor:
        import comfy.sample

        noise = draw(1, 4, *SIZE) if noise is None else noise
        return comfy.sample.sample(
            model,
            noise,
            steps,
            cfg,
            sampler,
            "normal",
            text(1) if positive is None else positive,
            text(2) if negative is None else negative,
            torch.zeros_like(noise),
            disable_pbar=True,
            seed=0,
            **kwargs,
        )


@pytest.fixture(scope="session")
def sample(host: host_process.Host) -> Sampler:
    return Sampler()


@pytest.fixture
def forwards(
    host: host_process.Host, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], list[tuple[Any, int]]]:
    """Record every forward pass: its chunks, and how many image prompts were live in a layer."""
    run = host.library("ip_adapter.host.run").Run
    seen: list[tuple[Any, int]] = []
    original = run.live

    def spy(self: Any, chunks: Any, sigma: Tensor, device: Any) -> Any:
        live = original(self, chunks, sigma, device)
        seen.append((chunks, len(live.get(("middle", 0, 0), ()))))
        return live

    monkeypatch.setattr(run, "live", spy)
    return lambda: seen


@pytest.fixture(scope="module")
def registered(host: Any) -> Iterator[Any]:
    """`miniature.host`; the host knows the miniature until the last test of the file."""
    import comfy.clip_vision
    import comfy.supported_models

    from miniature import host as registration

    known, load = list(comfy.supported_models.models), comfy.clip_vision.load_clipvision_from_sd
    registration.register()
    yield registration
    comfy.supported_models.models[:] = known
    comfy.clip_vision.load_clipvision_from_sd = load
