"""Every command that the documents name exists, with its options; the README's code runs."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from kernelnorm.cli import COMMANDS, parser_of
from kernelnorm.experiments.config import configure
from kernelnorm.experiments.launch import Launch
from kernelnorm.experiments.recipes import recipe_for
from kernelnorm.experiments.trainer import train
from kernelnorm.models import create_model
from kernelnorm.models.published import published_names

ROOT = Path(__file__).parent.parent
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
LINES = [
    (document, line)
    for document in DOCUMENTS
    for block in re.findall(r"```sh\n(.*?)```", document.read_text(), re.DOTALL)
    for line in block.replace("\\\n", "").splitlines()
    if re.search(r"\bkernelnorm [a-z]", line.split("#")[0])
]

# The code of these is run by tests of their own: below, and that of the recipes by make test-zoo.
RUN_ELSEWHERE = {
    "README.md",
    "docs/convert.md",
    "docs/private.md",
    "docs/recipes.md",
    "docs/training.md",
}


def python_blocks(document: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", document.read_text(), re.DOTALL)


PAGES = [
    document
    for document in DOCUMENTS
    if python_blocks(document) and str(document.relative_to(ROOT)) not in RUN_ELSEWHERE
]


@pytest.mark.parametrize(("document", "line"), LINES, ids=lambda value: getattr(value, "name", ""))
def test_commands_exist(
    document: Path, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    for block in re.findall(r"```yaml\n(.*?)```", document.read_text(), re.DOTALL):
        (tmp_path / "sweep.yaml").write_text(block)
    line = line[line.index("kernelnorm ") :].replace(" NORM ", " kernel ")
    _, command, *arguments = shlex.split(line, comments=True)
    parser_of(command).parse_args(arguments)


def test_every_command_is_named() -> None:
    named = {line.split("kernelnorm ")[1].split()[0] for _, line in LINES}
    assert named == {*COMMANDS}


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current folder has ``cat.jpg``, images in ``photos`` and a run on them in ``runs``."""
    monkeypatch.chdir(tmp_path)
    for label in ("cat", "dog"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for i in range(6):
            shade = (20 * i, 100 * (label == "dog"), 0)
            Image.new("RGB", (8, 8), shade).save(tmp_path / "photos" / label / f"{i}.png")
    Image.new("RGB", (30, 20)).save("cat.jpg")
    recipe = recipe_for(model="vgg8", dataset="photos")
    options = {"model_options": {"width": 0.25}, "image_size": 8, "epochs": 1}
    config = configure(recipe, norm="kernel", batch_size=4, lr=0.01, **options)
    train(config, Launch(out=Path("runs/photos"), verbose=False))


@pytest.mark.usefixtures("photos")
def test_the_python_code_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = python_blocks(ROOT / "README.md")
    assert len(blocks) == 3
    exec("\n".join(blocks), {})
    assert capsys.readouterr().out.split()[-1] in ("cat", "dog")


@pytest.mark.usefixtures("photos")
def test_the_code_of_the_page_on_training_loads_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = python_blocks(ROOT / "docs" / "training.md")
    exec(code, {})
    assert re.fullmatch(r"cat: [\d.]+%\ndog: [\d.]+%\n", capsys.readouterr().out)


def test_the_code_of_the_page_on_conversion_prints_what_it_says(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, printed, saving = re.findall(
        r"```(?:python)?\n(.*?)```", (ROOT / "docs" / "convert.md").read_text(), re.DOTALL
    )
    exec(code + saving, {})
    assert capsys.readouterr().out.strip() == printed.strip()


@pytest.mark.filterwarnings("ignore")  # of Opacus, about its generator of random numbers
def test_the_code_of_the_page_on_private_training_runs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("opacus")
    code, augmented, distributed, precision = python_blocks(ROOT / "docs" / "private.md")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    torch.set_float32_matmul_precision("high")
    exec(precision, {"torch": torch})
    assert not torch.backends.cudnn.allow_tf32
    assert torch.get_float32_matmul_precision() == "highest"

    names: dict[str, Any] = {"augment": lambda x: x.flip(3)}
    exec(code, names)
    names["network"].book.augmentations = 4
    exec(augmented, names)

    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        exec(code.replace("engine = ", f"{distributed}engine = "), {})
    finally:
        torch.distributed.destroy_process_group()
    assert all(float(epsilon) > 0 for epsilon in capsys.readouterr().out.split())


def slow_if_it_exports(page: Path) -> Any:
    marks = [pytest.mark.slow] if "torch.export.export" in page.read_text() else []
    return pytest.param(page, id=page.stem, marks=marks)


@pytest.mark.filterwarnings("ignore")  # of PyTorch about its exporters
@pytest.mark.parametrize("page", [*map(slow_if_it_exports, PAGES)])
def test_the_python_code_of_a_page_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if page.stem == "models":
        network = create_model("knresnet18")
        state, names = network.state_dict(), published_names(network)
        model = {theirs: state[ours] for theirs, ours in names.items()}
        torch.save({"model": model}, "knresnet18.pt")
    exec("\n".join(python_blocks(page)), {})


def anchors(document: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a document."""
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    """Relative links work on GitHub, and so in the site; external ones are well formed."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", document.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            assert re.fullmatch(r"https://[a-z0-9.-]+\.[a-z]+(/\S*)?", target), target
            continue
        path, _, anchor = target.partition("#")
        file = document.parent / path if path else document
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("document", ["CONTRIBUTING.md", "docs/design.md"])
def test_files_and_names_are_there(document: str) -> None:
    """The files that a document for developers names, and what it says is in them."""
    text = (ROOT / document).read_text()
    for file in re.findall(r"`((?:kernelnorm|tests|docs|benchmarks)/[\w./-]+\.\w+)`", text):
        assert (ROOT / file).is_file(), file
    for name, file in re.findall(r"`(\w+)` in\s+`((?:kernelnorm|tests)/[\w./-]+\.\w+)`", text):
        assert re.search(rf"\b{name}\b", (ROOT / file).read_text()), (name, file)
