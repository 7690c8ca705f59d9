"""Augmentation and normalization, compared with torchvision pixel by pixel."""

import pickle

import pytest
import torch
from PIL import Image
from real_images import real_images
from torchvision import transforms

from gflow_pl.data.augment import ToInputs, normalize, random_crop, random_flip


@pytest.fixture
def images():
    return torch.from_numpy(real_images()[0]).permute(0, 3, 1, 2).contiguous()


def windows_of(image, padding=4):
    """Every image that the random crop of torchvision can return, by (top, left)."""
    padded = transforms.Pad(padding)(Image.fromarray(image.permute(1, 2, 0).numpy()))
    size = image.shape[-1]
    return {
        (top, left): transforms.functional.pil_to_tensor(transforms.functional.crop(padded, top, left, size, size))
        for top in range(2 * padding + 1)
        for left in range(2 * padding + 1)
    }


def test_normalization_equals_torchvision_bit_for_bit(images):
    reference = transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)])
    expected = torch.stack([reference(Image.fromarray(x)) for x in real_images()[0]])
    before = images.clone()
    assert torch.equal(normalize(images), expected)
    assert torch.equal(images, before)


def test_every_crop_is_a_possible_crop_of_torchvision_and_all_shifts_occur(images):
    image = images[7]
    windows = windows_of(image)
    batch = image.expand(2000, -1, -1, -1)
    crops = random_crop(batch, 4, torch.Generator().manual_seed(0))
    assert crops.shape == batch.shape
    assert crops.dtype == torch.uint8
    places = {window.numpy().tobytes(): place for place, window in windows.items()}
    counts = dict.fromkeys(windows, 0)
    for crop in crops:
        counts[places[crop.numpy().tobytes()]] += 1
    # 81 shifts of probability 1/81: about 25 each.
    assert min(counts.values()) >= 5
    assert max(counts.values()) <= 60


def test_the_images_of_a_batch_shift_independently_and_keep_their_order(images):
    crops = random_crop(images, 4, torch.Generator().manual_seed(1))
    places = []
    for image, crop in zip(images, crops, strict=True):
        match = [place for place, window in windows_of(image).items() if torch.equal(window, crop)]
        assert len(match) == 1
        places += match
    assert len(set(places)) > 20


def test_about_half_of_the_images_are_flipped_and_the_others_unchanged(images):
    batch = images[3].expand(1000, -1, -1, -1)
    flipped = random_flip(batch, torch.Generator().manual_seed(0))
    mirrored = (flipped == images[3].flip(2)).flatten(1).all(1)
    same = (flipped == images[3]).flatten(1).all(1)
    assert bool((mirrored ^ same).all())
    assert 440 <= int(mirrored.sum()) <= 560


def test_plain_batches_draw_no_random_numbers(images):
    state = torch.get_rng_state()
    batch, labels = ToInputs()((images, torch.arange(50)))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(batch, normalize(images))
    assert labels.tolist() == list(range(50))


def test_augmented_batches_follow_the_global_seed_and_differ_between_ranks(images):
    labels = torch.arange(50)

    def batch(seed, rank=0):
        torch.manual_seed(seed)
        return ToInputs(augment=True, rank=rank)((images, labels))[0]

    assert torch.equal(batch(0), batch(0))
    assert not torch.equal(batch(0), batch(1))
    assert not torch.equal(batch(0), batch(0, rank=1))
    torch.manual_seed(0)
    first = ToInputs(augment=True)((images, labels))[0]
    second = ToInputs(augment=True)((images, labels))[0]
    assert not torch.equal(first, second)


def test_an_augmented_batch_is_cropped_flipped_and_normalized(images):
    torch.manual_seed(3)
    batch, _ = ToInputs(augment=True)((images, torch.arange(50)))
    for image, result in zip(images, batch, strict=True):
        choices = [normalize(x) for window in windows_of(image).values() for x in (window, window.flip(2))]
        assert any(torch.equal(result, choice) for choice in choices)


def test_single_images_collate_to_the_same_batch(images):
    pairs = [(image, torch.tensor(label)) for label, image in enumerate(images)]
    batch, labels = ToInputs()(pairs)
    assert torch.equal(batch, normalize(images))
    assert labels.tolist() == list(range(50))


def test_the_collate_function_can_be_pickled():
    copy = pickle.loads(pickle.dumps(ToInputs(augment=True, rank=3)))
    assert (copy.augment, copy.rank) == (True, 3)
