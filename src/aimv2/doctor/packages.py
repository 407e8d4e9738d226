"""The packages that aimv2 requires, and the command that installs a missing one. Imports none of them."""

from __future__ import annotations

from importlib import metadata

LEFT_OUT = ("dev",)  # extras for developers only
# module -> package, where the names differ
INSTALLED_AS = {
    "PIL": "pillow",
    "faiss": "faiss-cpu",
    "material": "mkdocs-material",
    "megatron": "megatron-energon",
    "pillow_heif": "pillow-heif",
    "ryml": "rapidyaml",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}

RequiredPackage = tuple[str, str, str | None]  # package, version specifier, installed version


def requirements() -> dict[str, list[RequiredPackage]]:
    """Requirements of the installed aimv2: extra ("" for the core) -> packages.

    Raises:
        PackageNotFoundError: aimv2 is not installed.
    """
    from packaging.requirements import Requirement

    extras = [name for name in metadata.metadata("aimv2").get_all("Provides-Extra") or [] if name not in LEFT_OUT]
    out: dict[str, list[RequiredPackage]] = {name: [] for name in ["", *extras]}
    for line in metadata.requires("aimv2") or []:
        one = Requirement(line)
        of_extra = one.marker is not None and "extra" in str(one.marker)
        for extra, packages in out.items():
            if bool(extra) == of_extra and (one.marker is None or one.marker.evaluate({"extra": extra})):
                packages.append((one.name, str(one.specifier), version_of(one.name)))
    return out


def version_of(package: str) -> str | None:
    """The installed version; None if not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def satisfies(version: str, wanted: str) -> bool:
    """Whether a version satisfies a specifier such as ``>=1.2,<3``."""
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(wanted).contains(version, prereleases=True)


def install_line(module: str) -> str | None:
    """Command that installs the package of a missing module; None if aimv2 does not require it."""
    top = module.partition(".")[0]
    package = INSTALLED_AS.get(top, top)
    try:
        required = requirements()
    except (metadata.PackageNotFoundError, ImportError):
        return None
    for extra, packages in required.items():
        for name, wanted, _ in packages:
            if name.replace("_", "-").lower() == package.replace("_", "-").lower():
                return f"pip install 'aimv2[{extra}]'" if extra else f"pip install '{name}{wanted}'"
    return None
