"""Which packages aimv2 asks for, and how one that is missing is installed. Nothing here imports any of them."""

from __future__ import annotations

from importlib import metadata

LEFT_OUT = ("dev",)  # extras that are no one's but the developers'
# what is imported -> what is installed, where the names differ
INSTALLED_AS = {
    "PIL": "pillow",
    "faiss": "faiss-cpu",
    "material": "mkdocs-material",
    "megatron": "megatron-energon",
    "ryml": "rapidyaml",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}

Asked = tuple[str, str, str | None]  # package, the versions that will do, the installed one


def requirements() -> dict[str, list[Asked]]:
    """What the installed aimv2 asks for: extra ("" for every user) -> packages.

    Raises:
        PackageNotFoundError: aimv2 runs without being installed.
    """
    from packaging.requirements import Requirement

    extras = [name for name in metadata.metadata("aimv2").get_all("Provides-Extra") or [] if name not in LEFT_OUT]
    out: dict[str, list[Asked]] = {name: [] for name in ["", *extras]}
    for line in metadata.requires("aimv2") or []:
        one = Requirement(line)
        of_extra = one.marker is not None and "extra" in str(one.marker)
        for extra, packages in out.items():
            if bool(extra) == of_extra and (one.marker is None or one.marker.evaluate({"extra": extra})):
                packages.append((one.name, str(one.specifier), version_of(one.name)))
    return out


def version_of(package: str) -> str | None:
    """The installed version; None where there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def satisfies(version: str, wanted: str) -> bool:
    """Whether a version lies within ``>=1.2,<3``."""
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(wanted).contains(version, prereleases=True)


def install_line(module: str) -> str | None:
    """How to install what a missing module belongs to; None where aimv2 never asked for it."""
    top = module.partition(".")[0]
    package = INSTALLED_AS.get(top, top)
    try:
        asked = requirements()
    except (metadata.PackageNotFoundError, ImportError):
        return None
    for extra, packages in asked.items():
        for name, wanted, _ in packages:
            if name.replace("_", "-").lower() == package.replace("_", "-").lower():
                return f"pip install 'aimv2[{extra}]'" if extra else f"pip install '{name}{wanted}'"
    return None
