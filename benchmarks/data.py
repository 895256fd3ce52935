"""The data path of stage 1: decoding, crops, and photometric augmentation, each beside its reference in the same run.

1. Decoding alone, ms per photo and core: Pillow (the reference), orl.data.decode, and OpenCV and TorchCodec where
   they are installed; the largest difference of a pixel to Pillow's.
2. Resizing two random crops of a photo: Pillow (the reference) and orl.data.decode.resize_crop; the differences.
3. Samples of stage 1 (two views each) per second and core, from files that the system has cached, decoded at full
   size. Reference: Pillow and torchvision's transforms (v1) do everything on the CPU. Ours: decoding and crops alone,
   which is what a CPU worker does (target: 3 times the reference), and with the augmentation on the device.
4. Photometric augmentation of a batch on the device with its own parameters for each view, ms per view: ours,
   torchvision's v2 (in a loop, for it draws one set of parameters per call), Kornia where it is installed; Pillow and
   torchvision's v1 on one core (the reference). Then which of their operations equal Pillow's.

    python benchmarks/data.py                      # a minute or two
    python benchmarks/data.py --photos FOLDER      # on these JPEGs
"""

from __future__ import annotations

import argparse
import io
import math
import os
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from common import best, machine, optional, photos, write_manifest
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torch.utils.data import default_collate
from torchvision import transforms as v1
from torchvision.transforms import functional as v1f
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as v2f

from orl.config import Stage1, Views
from orl.data.decode import decode, resize_crop
from orl.data.views import random_resized_crop, rng
from orl.networks import MEAN, STD
from orl.networks.backbones import device
from orl.pretrain.samples import ImageViews
from orl.training import augment as own
from orl.training.augment import SOLARIZE_THRESHOLD, augment, draw

KERNEL = 23  # of the blurs that want a kernel's width: a tenth of the view, as BYOL's


def difference(found: list[np.ndarray], expected: list[np.ndarray]) -> str:
    """Largest and mean difference, of 255."""
    pairs = list(zip(found, expected, strict=True))
    largest = max(float(np.abs(a.astype(np.float64) - b).max()) for a, b in pairs)
    mean = float(np.mean([np.abs(a.astype(np.float64) - b).mean() for a, b in pairs]))
    return f"largest difference {largest:.3g}, mean {mean:.3g}"


def by_pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def decoding(files: list[bytes], repeats: int) -> None:
    """Files in memory to pixels in memory."""
    ways: dict[str, Callable[[bytes], np.ndarray]] = {"Pillow": by_pillow, "orl.data.decode": decode}
    cv2, torchcodec = optional("cv2"), optional("torchcodec.decoders")
    if cv2:
        cv2.setNumThreads(1)
        flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        ways["OpenCV"] = lambda data: cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    if torchcodec:
        ways["TorchCodec"] = lambda data: torchcodec.decode_jpeg(data).permute(1, 2, 0).numpy()
    jobs: dict[str, Callable[[], object]] = {
        name: lambda way=way: [way(data) for data in files]  # type: ignore[misc]
        for name, way in ways.items()
    }
    expected = [by_pillow(data) for data in files]
    seconds = best(jobs, repeats)
    for name, way in ways.items():
        took, times = 1000 * seconds[name] / len(files), seconds["Pillow"] / seconds[name]
        differs = difference([way(data) for data in files], expected)
        print(f"decode, {name}: {took:.2f} ms per photo and core, {times:.2f} x Pillow; {differs}")
    for name, module in (("OpenCV", cv2), ("TorchCodec", torchcodec)):
        if not module:
            print(f"decode, {name}: not installed")
    if torchcodec and torch.cuda.is_available():
        try:
            took = best({"": lambda: torchcodec.decode_jpeg(files, device="cuda")}, repeats)[""]
            found = [image.permute(1, 2, 0).cpu().numpy() for image in torchcodec.decode_jpeg(files, device="cuda")]
            rate = 1000 * took / len(files)
            print(f"decode, TorchCodec on the GPU: {rate:.2f} ms per photo; {difference(found, expected)}")
        except RuntimeError as error:  # a build without nvJPEG
            print(f"decode, TorchCodec on the GPU: fails ({str(error).splitlines()[0]})")


def resizing(decoded: list[np.ndarray], side: int, repeats: int) -> None:
    """Pixels in memory to two crops in memory."""
    pictures, views = [Image.fromarray(photo) for photo in decoded], Views()
    boxes = [
        [random_resized_crop(picture.size, rng(0, 0, row, view), views.scale, views.ratio) for view in (0, 1)]
        for row, picture in enumerate(pictures)
    ]

    def pillow() -> list[np.ndarray]:
        return [
            np.asarray(picture.crop((x, y, x + w, y + h)).resize((side, side), Image.Resampling.BILINEAR))
            for picture, two in zip(pictures, boxes, strict=True)
            for x, y, w, h in two
        ]

    def ours() -> list[np.ndarray]:
        return [resize_crop(photo, box, (side, side)) for photo, two in zip(decoded, boxes, strict=True) for box in two]

    seconds = best({"Pillow": pillow, "orl.data.decode": ours}, repeats)
    times = seconds["Pillow"] / seconds["orl.data.decode"]
    for name, took in seconds.items():
        print(f"two crops to {side} px, {name}: {1000 * took / len(decoded):.2f} ms per photo and core")
    print(f"two crops to {side} px: ours is {times:.2f} x Pillow; {difference(ours(), pillow())}")


def pillow_transforms(views: Views, recipe: int) -> list[Any]:
    """The photometric part of a view by torchvision's v1 on Pillow's images."""

    def blurred(image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(float(np.random.uniform(*views.blur_radius))))  # noqa: NPY002

    return [
        v1.RandomHorizontalFlip(views.flip_p),
        v1.RandomApply([v1.ColorJitter(*views.jitter)], views.jitter_p),
        v1.RandomGrayscale(views.grayscale_p),
        v1.RandomApply([blurred], views.blur_p[recipe]),
        v1.RandomApply([lambda image: ImageOps.solarize(image, SOLARIZE_THRESHOLD)], views.solarize_p[recipe]),
        v1.ToTensor(),
        v1.Normalize(MEAN, STD),
    ]


def samples(root: str, names: list[str], folder: str, side: int, repeats: int) -> None:
    """Files to the two views of each."""
    settings, where = Stage1(views=Views(size=side)), device()
    manifest = write_manifest(os.path.join(folder, "manifest.csv"), root, names, max(2, len(names)))
    dataset = ImageViews(root, manifest, "ignore", settings, 0)
    crop = v1.RandomResizedCrop(side, settings.views.scale, settings.views.ratio)
    both = [v1.Compose([crop, *pillow_transforms(settings.views, recipe)]) for recipe in (0, 1)]
    rows = range(len(manifest))

    def reference() -> None:
        for path in manifest.path:
            image = Image.open(os.path.join(root, str(path))).convert("RGB")
            for transform in both:
                transform(image)

    def end_to_end() -> None:
        for first in range(0, len(rows), 32):
            images, parameters = default_collate([dataset[0, row] for row in rows[first : first + 32]])
            for view in (0, 1):
                augment(images[view].to(where).permute(0, 3, 1, 2), parameters[:, view])

    jobs: dict[str, Callable[[], object]] = {
        "Pillow + torchvision, all on the CPU (reference)": reference,
        "ours, decode + crop": lambda: [dataset[0, row] for row in rows],
        f"ours, end to end, one process, augmented on the {where.type}": end_to_end,
    }
    seconds = best(jobs, repeats)
    reference_name, *_ = seconds
    for name, took in seconds.items():
        times = seconds[reference_name] / took
        target = " (target 3)" if name == "ours, decode + crop" else ""
        print(f"stage 1, {name}: {len(rows) / took:.1f} samples per second and core, {times:.2f} x{target}")


def pipelines(views: Views, recipe: int, where: torch.device) -> dict[str, Callable[[Tensor], object]]:
    """Ways to augment uint8 [B, 3, S, S] on the device as a view of one recipe; parameters are drawn inside."""
    random = np.random.default_rng(0)

    def ours(images: Tensor) -> Tensor:
        return augment(images, torch.from_numpy(np.stack([draw(views, recipe, random) for _ in images])))

    of_one = v2.Compose(
        [
            v2.RandomHorizontalFlip(views.flip_p),
            v2.RandomApply([v2.ColorJitter(*views.jitter)], views.jitter_p),
            v2.RandomGrayscale(views.grayscale_p),
            v2.RandomApply([v2.GaussianBlur(KERNEL, views.blur_radius)], views.blur_p[recipe]),
            v2.RandomSolarize(SOLARIZE_THRESHOLD, views.solarize_p[recipe]),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(list(MEAN), list(STD)),
        ]
    )
    ways: dict[str, Callable[[Tensor], object]] = {
        "ours": ours,
        "torchvision v2, one view after the other": lambda images: torch.stack([of_one(image) for image in images]),
    }
    kornia = optional("kornia.augmentation")
    if kornia:
        of_batch = torch.nn.Sequential(
            kornia.RandomHorizontalFlip(p=views.flip_p),
            kornia.ColorJitter(*views.jitter, p=views.jitter_p, same_on_batch=False),
            kornia.RandomGrayscale(p=views.grayscale_p),
            kornia.RandomGaussianBlur((KERNEL, KERNEL), views.blur_radius, p=views.blur_p[recipe], same_on_batch=False),
            kornia.RandomSolarize(thresholds=0.0, additions=0.0, p=views.solarize_p[recipe]),
            kornia.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
        ).to(where)
        ways["Kornia"] = lambda images: of_batch(images.float() / 255)
    return ways


def augmenting(crops: Tensor, repeats: int) -> None:
    """Batches of uint8 crops on the device to network inputs; half of them by each recipe."""
    views, where = Views(size=crops.shape[-1]), device()
    on_device = crops.to(where)
    pictures = [Image.fromarray(crop.permute(1, 2, 0).numpy()) for crop in crops]
    of_pillow = [v1.Compose(pillow_transforms(views, recipe)) for recipe in (0, 1)]
    jobs: dict[str, Callable[[], object]] = {
        "Pillow + torchvision v1 on one core (reference)": lambda: [
            transform(picture) for transform in of_pillow for picture in pictures
        ]
    }
    of_recipe = [pipelines(views, recipe, where) for recipe in (0, 1)]
    for name in of_recipe[0]:
        jobs[f"{name}, on the {where.type}"] = lambda name=name: [way[name](on_device) for way in of_recipe]  # type: ignore[misc]
    for job in jobs.values():
        job()  # warm-up
    seconds = best(jobs, repeats)
    for name, took in seconds.items():
        print(f"augment {len(crops)} views of {views.size} px, {name}: {1000 * took / len(crops) / 2:.3f} ms per view")
    if "Kornia" not in of_recipe[0]:
        print("augment, Kornia: not installed")


def operations(crops: Tensor) -> None:
    """Largest and mean difference of each operation to Pillow's, the same parameters for each view."""
    where, random = device(), np.random.default_rng(0)
    batch = crops.to(where)
    pictures = [Image.fromarray(crop.permute(1, 2, 0).numpy()) for crop in crops]
    kornia = optional("kornia")
    turn = 2 * math.pi
    # Range of the parameter; Pillow on one picture; ours on a float batch; v2 on one uint8 view; Kornia on 0 to 1.
    table: dict[str, tuple[tuple[float, float], Callable, Callable, Callable, Callable]] = {
        "brightness": (
            (0.6, 1.4),
            v1f.adjust_brightness,
            own.brightness,
            v2f.adjust_brightness,
            lambda x, f: kornia.enhance.adjust_brightness_accumulative(x, f),
        ),
        "contrast": (
            (0.6, 1.4),
            v1f.adjust_contrast,
            own.contrast,
            v2f.adjust_contrast,
            lambda x, f: kornia.enhance.adjust_contrast_with_mean_subtraction(x, f),
        ),
        "saturation": (
            (0.8, 1.2),
            v1f.adjust_saturation,
            own.saturation,
            v2f.adjust_saturation,
            lambda x, f: kornia.enhance.adjust_saturation_with_gray_subtraction(x, f),
        ),
        "hue": (
            (-0.1, 0.1),
            v1f.adjust_hue,
            own.hue,
            v2f.adjust_hue,
            lambda x, f: kornia.enhance.adjust_hue(x, f * turn),
        ),
        "grayscale": (
            (0, 1),
            lambda image, _: v1f.rgb_to_grayscale(image, 3),
            lambda x, _: own.grayscale(x),
            lambda x, _: v2f.rgb_to_grayscale(x, 3),
            lambda x, _: kornia.color.rgb_to_grayscale(x).expand_as(x),
        ),
        "blur": (
            (0.1, 2.0),
            lambda image, f: image.filter(ImageFilter.GaussianBlur(f)),
            lambda x, f: own.blur(x, torch.from_numpy(own.blur_taps(f.cpu().numpy())).to(x.device)),
            lambda x, f: v2f.gaussian_blur(x, [KERNEL, KERNEL], [f, f]),
            lambda x, f: kornia.filters.gaussian_blur2d(x, (KERNEL, KERNEL), torch.stack([f, f], 1)),
        ),
        "solarize": (
            (0, 1),
            lambda image, _: ImageOps.solarize(image, SOLARIZE_THRESHOLD),
            lambda x, _: own.solarize(x),
            lambda x, _: v2f.solarize(x, SOLARIZE_THRESHOLD),
            lambda x, _: kornia.enhance.solarize(x, SOLARIZE_THRESHOLD / 255),
        ),
    }
    for name, (limits, of_pillow, of_ours, of_v2, of_kornia) in table.items():
        factor = random.uniform(*limits, len(crops)).astype(np.float32)
        expected = [np.asarray(of_pillow(picture, float(f))) for picture, f in zip(pictures, factor, strict=True)]
        on_device = torch.from_numpy(factor).to(where)
        found = {
            "ours": of_ours(batch.float(), on_device),
            "torchvision v2": [of_v2(view, float(f)) for view, f in zip(batch, factor, strict=True)],
        }
        if kornia:
            found["Kornia"] = 255 * of_kornia(batch.float() / 255, on_device)
        for way, images in found.items():
            differs = difference([image.permute(1, 2, 0).cpu().numpy() for image in images], expected)
            equal = "equal to Pillow; " if differs.startswith("largest difference 0,") else ""
            print(f"{name}, {way}: {equal}{differs}")
    if not kornia:
        print("operations, Kornia: not installed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", help="folder of JPEGs (default: coco-mini beside the project, else generated ones)")
    parser.add_argument("--count", type=int, default=64, help="photos (default %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="views that are augmented together (default %(default)s)")
    parser.add_argument("--size", type=int, default=224, help="of a view, pixels (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="of which the best counts (default %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the figures are per core
    torch.manual_seed(0)
    print(machine(), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        root, names = photos(args.photos, args.count, folder)
        files = []
        for name in names:
            with open(os.path.join(root, name), "rb") as file:
                files.append(file.read())
        decoded = [decode(data) for data in files]
        pixels = np.mean([photo.shape[0] * photo.shape[1] for photo in decoded]) / 1e6
        print(f"one file: {np.mean([len(data) for data in files]) / 1000:.0f} kB, {pixels:.2f} megapixels on average")
        decoding(files, args.repeats)
        resizing(decoded, args.size, args.repeats)
        samples(root, names, folder, args.size, args.repeats)
        boxes = [
            random_resized_crop(decoded[row % len(decoded)].shape[1::-1], rng(0, 1, row)) for row in range(args.batch)
        ]
        crops = [resize_crop(decoded[row % len(decoded)], box, (args.size, args.size)) for row, box in enumerate(boxes)]
        batch = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)
        augmenting(batch, args.repeats)
        operations(batch)


if __name__ == "__main__":
    main()
