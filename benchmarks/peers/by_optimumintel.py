"""optimum-intel: the encoder as an OpenVINO model that NNCF quantizes, under the task's own head in torch.

It needs an older transformers than s2d asks for; reading a saved classifier works there.
"""

from __future__ import annotations

from typing import Any

from peers.contract import TEXT, Job, way
from torch import Tensor, nn

PACKAGE = "optimum.intel"


class Encoder(nn.Module):
    """OpenVINO's model, called as transformers' own."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.__dict__["made"] = model

    def forward(self, **inputs: Tensor) -> Any:
        """With ``last_hidden_state``."""
        return self.made(**inputs)


def _exported(job: Job, **settings: Any) -> Any:
    from optimum.intel import OVModelForFeatureExtraction  # pyright: ignore[reportMissingImports]

    job.inner.save_pretrained(job.folder / "plain")
    return OVModelForFeatureExtraction.from_pretrained(job.folder / "plain", export=True, **settings)


@way("w8a8-static", "OVQuantizer, its defaults (NNCF, SmoothQuant), OpenVINO", beds=(TEXT,))
def w8a8(job: Job) -> nn.Module:
    """The whole encoder."""
    import nncf  # pyright: ignore[reportMissingImports]
    from optimum.intel import OVConfig, OVQuantizationConfig, OVQuantizer  # pyright: ignore[reportMissingImports]

    plain = _exported(job, compile=False)
    examples: Any = nncf.Dataset([{name: value.numpy() for name, value in each.items()} for each in job.inputs])
    config = OVConfig(quantization_config=OVQuantizationConfig(num_samples=len(job.inputs)))
    OVQuantizer.from_pretrained(plain).quantize(
        calibration_dataset=examples, ov_config=config, save_directory=job.folder / "made"
    )
    return job.replace(Encoder(type(plain).from_pretrained(job.folder / "made")))


@way("w4a16", "OVWeightQuantizationConfig: int4 in groups of 32, OpenVINO", beds=(TEXT,))
def w4(job: Job) -> nn.Module:
    """Rounded."""
    from optimum.intel import OVWeightQuantizationConfig  # pyright: ignore[reportMissingImports]

    config = OVWeightQuantizationConfig(bits=4, sym=True, group_size=32, ratio=1.0)
    return job.replace(Encoder(_exported(job, quantization_config=config)))
