"""Feature maps as a value: taken out of a network, changed, put back."""

from __future__ import annotations

import pytest
import torch

from comfyui_mend import models
from comfyui_mend.engine import feature_maps, loaded, tiling
from comfyui_mend.errors import InputError
from comfyui_mend.models import features
from comfyui_mend.nodes.features import DecodeFeatures, EncodeFeatures

CONFIGS = {
    "nafnet": {"width": 8, "enc_blk_nums": (1, 1), "middle_blk_num": 1, "dec_blk_nums": (1, 1)},
    "dcpt-swinir": {"embed_dim": 12, "depths": (1,) * 6, "num_heads": (3,) * 6, "window_size": 4},
    "dcpt-restormer": {"dim": 8, "num_blocks": (1,) * 4, "num_refinement_blocks": 1, "heads": (1, 2, 2, 4)},
    "moce-ir": {"dim": 8, "num_blocks": (1,) * 4, "num_dec_blocks": (1,) * 3, "heads": (1, 2, 4, 8)},
}


def _restorer(name: str) -> models.Restorer:
    module = models.create(name, CONFIGS[name]).eval().requires_grad_(False)
    for parameter in module.parameters():
        if parameter.abs().max() == 0:
            parameter.normal_(std=0.1)
    return models.Restorer(models.registry.get(name), CONFIGS[name], module)


@pytest.mark.parametrize("name", CONFIGS)
def test_decoding_what_was_encoded_is_restoring(name):
    restorer, image = _restorer(name), torch.rand(2, 3, 19, 30)
    encoded = features.encode(restorer, image)
    assert len(encoded) == 2 and len(encoded.maps) >= 2
    torch.testing.assert_close(features.decode(restorer, encoded), restorer(image))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_map_has_an_effect(name):
    restorer, image = _restorer(name), torch.rand(1, 3, 16, 16)
    encoded = features.encode(restorer, image)
    for level in range(len(encoded.maps)):
        gains = [0.0 if i == level else 1.0 for i in range(len(encoded.maps))]
        assert (features.decode(restorer, encoded.scaled(gains)) - restorer(image)).abs().max() > 1e-7


def test_blending_fully_is_the_other_pictures_features():
    restorer, (first, second) = _restorer("nafnet"), torch.rand(2, 1, 3, 16, 16)
    a, b = features.encode(restorer, first), features.encode(restorer, second)
    assert all(torch.equal(x, y) for x, y in zip(a.blend(b, [1.0] * 3).maps, b.maps, strict=True))
    assert a.blend(b, [0.0] * 3).maps[0] is a.maps[0]
    with pytest.raises(InputError, match="same size"):
        a.blend(features.encode(restorer, torch.rand(1, 3, 32, 16)), [1.0] * 3)


def test_features_fit_only_the_network_that_made_them():
    encoded = features.encode(_restorer("nafnet"), torch.rand(1, 3, 16, 16))
    with pytest.raises(InputError, match="made by nafnet"):
        features.decode(_restorer("dcpt-swinir"), encoded)
    other = models.create("nafnet", {**CONFIGS["nafnet"], "width": 4})
    with pytest.raises(InputError, match="features: made by a NAFNet of another size"):
        features.decode(models.Restorer(models.registry.get("nafnet"), {}, other), encoded)
    with pytest.raises(InputError, match="gains"):
        encoded.scaled([1.0])


@pytest.mark.parametrize(("gains", "message"), [("nan", "gains: 'nan' holds a number"), ("1e38", "use smaller gains")])
def test_gains_that_leave_no_picture_are_refused(gains, message):
    network = loaded.wrap(_restorer("nafnet"))
    encoded = EncodeFeatures.execute(network, torch.rand(1, 16, 16, 3))[0]
    with pytest.raises(InputError, match=message):
        DecodeFeatures.execute(network, encoded, gains)


def test_a_network_without_features_is_named():
    restorer = models.Restorer(models.registry.get("nafnet"), CONFIGS["nafnet"], torch.nn.Identity())
    with pytest.raises(InputError, match="does not offer"):
        features.encode(restorer, torch.rand(1, 3, 16, 16))


def test_principal_components_find_the_direction_that_varies():
    pattern = torch.rand(1, 1, 8, 8)
    maps = pattern * torch.tensor([1.0, -3.0, 0.5, 0.0])[None, :, None, None]
    colours = features.principal_components(maps)
    assert colours.shape == (1, 3, 8, 8) and colours.min() >= 0 and colours.max() <= 1
    # Largest loading positive: the channel with -3 decides the sign, so the picture is the pattern upside down.
    assert torch.corrcoef(torch.stack([colours[0, 0].flatten(), pattern.flatten()]))[0, 1] < -0.99
    assert features.principal_components(torch.rand(2, 2, 4, 4), (9, 7)).shape == (2, 3, 9, 7)


def test_local_pooling_is_the_same_through_features():
    restorer = _restorer("nafnet")
    given = loaded.wrap(restorer).with_options(local_pooling=8)
    image = torch.rand(1, 3, 40, 48)
    restored = feature_maps.decode(given, feature_maps.encode(given, image))
    torch.testing.assert_close(restored, tiling.restore(given, image))
    assert not torch.equal(restored, tiling.restore(loaded.wrap(restorer), image))
