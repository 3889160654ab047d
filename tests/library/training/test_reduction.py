"""From element-wise losses to one number per sample."""

from __future__ import annotations

import torch

from library.training.losses.reduction import loss_mask, per_sample_loss


def test_all_weights_multiply_and_samples_stay_apart():
    elementwise = torch.rand(3, 2, 4, 4)
    weights = {name: torch.rand(3) for name in ("flow_weight", "sample_weights", "factors")}
    mask = torch.rand(3, 1, 4, 4)
    whole = per_sample_loss(elementwise, mask=mask, **weights)
    expected = (
        (elementwise * mask).mean(dim=(1, 2, 3))
        * weights["flow_weight"]
        * weights["sample_weights"]
        * weights["factors"]
    )
    torch.testing.assert_close(whole, expected)
    one = per_sample_loss(elementwise[1:2], mask=mask[1:2], **{k: v[1:2] for k, v in weights.items()})
    torch.testing.assert_close(one, whole[1:2])


def test_an_empty_batch_has_no_losses():
    assert per_sample_loss(torch.empty(0, 2, 4, 4), flow_weight=torch.empty(0)).shape == (0,)
    mask = loss_mask(None, torch.empty(0, 32, 32), torch.Size((0, 16, 4, 4)), masked_loss=False)
    assert per_sample_loss(torch.empty(0, 16, 4, 4), mask=mask).shape == (0,)


def test_a_mask_is_resized_by_area_and_fits_video():
    alpha = torch.zeros(1, 8, 8)
    alpha[:, :, :2] = 1.0
    mask = loss_mask(None, alpha, torch.Size((1, 16, 2, 2)), masked_loss=False)
    assert mask.tolist() == [[[[0.5, 0.0], [0.5, 0.0]]]]
    assert loss_mask(None, alpha, torch.Size((1, 16, 3, 2, 2)), masked_loss=False).shape == (1, 1, 1, 2, 2)


def test_a_conditioning_image_is_a_mask_only_for_masked_loss():
    image, alpha = torch.full((1, 3, 8, 8), -1.0), torch.ones(1, 8, 8)
    shape = torch.Size((1, 16, 2, 2))
    assert loss_mask(image, None, shape, masked_loss=False) is None
    assert float(loss_mask(image, alpha, shape, masked_loss=True).max()) == 0.0
    assert float(loss_mask(image, alpha, shape, masked_loss=False).min()) == 1.0
    assert loss_mask(None, None, shape, masked_loss=True) is None
