"""The command ``detect PHOTO``: boxes of words in pictures, drawn."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aimv2.data.images.decode import ImageError, decode_image
from aimv2.detect.find import OpenDetector, find_objects, open_detector
from aimv2.distributed import default_device, usable_device
from aimv2.errors import UsageError, nearest
from aimv2.evals.caption import image_files
from aimv2.io import say
from aimv2.report.boxes import draw_boxes

if TYPE_CHECKING:
    from aimv2.commands.detect_photo import DetectPhotoOptions


def find_in_images(options: DetectPhotoOptions) -> dict[str, Any]:
    """Finds and draws.

    Returns:
        ``words``, ``threshold`` and ``images``: of each ``image``, ``size``, ``found`` ({"words", "score", "box": [x, y, width,
        height]}, the best first) and ``drawn``; ``rejected``: files that are no images.

    Raises:
        UsageError: no pictures, no detector, words that a fixed list lacks.
    """
    assert options.model is not None
    if not options.images:
        raise UsageError("IMAGES: at least one image file or folder is expected", code="missing")
    files = list(image_files(options.images))
    detector = open_detector(options.model, usable_device(default_device(options.device)), "--model")
    words = words_of(options.words, detector)
    threshold = detector.threshold if options.threshold is None else options.threshold
    out = Path(options.out or ".")
    out.mkdir(parents=True, exist_ok=True)
    images, rejected = list[dict[str, Any]](), list[dict[str, str]]()
    for file in files:
        try:
            image = decode_image(file)
        except ImageError as error:
            rejected.append({"image": str(file), "reason": str(error)})
            continue
        pixels, place = detector.pixels(image)
        wanted = words if detector.prompts is not None else detector.names
        (found,) = find_objects(detector.model, detector.prompts, pixels[None], wanted)
        shown = [
            at
            for at, label in enumerate(found.labels.tolist())
            if found.scores[at] >= threshold and wanted[label] in words
        ]
        boxes = place.back(found.boxes[shown].double().numpy(), image.size)
        rows = list[dict[str, Any]]()
        for at, (left, top, right, bottom) in zip(shown, boxes.tolist()):
            name = wanted[int(found.labels[at])]
            rows.append(
                {"words": name, "score": float(found.scores[at]), "box": [left, top, right - left, bottom - top]}
            )
        labels = [f"{row['words']} {row['score']:.2f}" for row in rows]
        drawn = new_name(out, file.stem, {one["drawn"] for one in images})
        draw_boxes(image, boxes, labels, [words.index(row["words"]) for row in rows]).save(drawn)
        images.append({"image": str(file), "size": list(image.size), "found": rows, "drawn": str(drawn)})
    if not images:
        raise UsageError(
            f"IMAGES: none of {len(files)} could be read; {rejected[0]['image']}: {rejected[0]['reason']}",
            code="unreadable",
        )
    return {"model": options.model, "words": words, "threshold": threshold, "images": images, "rejected": rejected}


def new_name(out: Path, stem: str, taken: set[str]) -> Path:
    """Where a picture is drawn: STEM-found.png, with a number where another picture of this call has that name."""
    names = (out / f"{stem}-found{f'-{number}' if number > 1 else ''}.png" for number in count(1))
    return next(name for name in names if str(name) not in taken)


def words_of(given: str | None, detector: OpenDetector) -> list[str]:
    """What to find, each once."""
    if given is None:
        if not detector.names:
            raise UsageError(
                "--words is not given, and the detector was trained on no classes; phrases with commas are expected",
                option="--words",
                code="missing",
            )
        return detector.names
    words = list(dict.fromkeys(word.strip() for word in given.split(",") if word.strip()))
    strange = [word for word in words if detector.prompts is None and word not in detector.names]
    if strange:
        raise UsageError(
            f"--words: '{strange[0]}' is no class of this detector, which has a fixed list{nearest(strange[0], detector.names)}",
            option="--words",
            code="unknown",
        )
    if detector.prompts is not None and (unknown := detector.prompts.spelt(words)):
        say(
            f"--words: the detector's vocabulary has no word {', '.join(map(repr, unknown[:5]))}; what is found for it means nothing"
        )
    return words
