"""Package metadata: everything is read from settings.ini, the one place for the version and the requirements."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent
EXTRAS = ("serve", "cloud", "sweep", "kaggle", "pretrained", "frontend", "docs", "dev")

config = ConfigParser(delimiters=["="])
config.read(HERE / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]


def requirements(key: str) -> list[str]:
    """The non-empty lines of one `…requirements` entry."""
    return [line.strip() for line in cfg.get(key, "").splitlines() if line.strip()]


extras = {name: requirements(f"{name}_requirements") for name in EXTRAS}
# tests run all that runs on one machine
extras["dev"] += extras["serve"] + extras["docs"] + extras["kaggle"] + extras["pretrained"] + extras["frontend"]
extras["all"] = sorted({line for lines in extras.values() for line in lines})

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(HERE / "README.md").read_text(encoding="utf-8") if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    keywords=cfg["keywords"].split(),
    license="Apache-2.0",
    packages=find_packages(include=["project", "project.*"]),
    package_data={"project": ["py.typed"]},
    include_package_data=True,
    python_requires=f">={cfg['min_python']}",
    install_requires=requirements("requirements"),
    extras_require=extras,
    entry_points={
        "console_scripts": [cfg["console_scripts"]],
        "nbdev": ["project=project._modidx:d"],
        # papermill loads this on every run; it makes our engine the default (see nbs/runs/50_engine.ipynb)
        "papermill.engine": ["project=project.runs.engine:papermill_engine"],
    },
    zip_safe=False,
)
