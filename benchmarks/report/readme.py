"""The report's headline in the README, with links that work there."""

import pathlib
import re


HEADLINE = re.compile(r"(?<=\[start:headline\] -->\n).*?(?=\n<!-- --8<-- \[end)", re.S)


def headline(report: str) -> str:
    """The headline of the report, as the README shows it."""
    table = HEADLINE.findall(report)[0]
    table = re.sub(" {2,}", " ", re.sub("-{3,}", "---", table))
    return table.replace("](report.md", "](docs/report.md")


def update(readme: pathlib.Path, report: str) -> None:
    """Write the headline of the report into the README."""
    text = HEADLINE.sub(lambda _: headline(report), readme.read_text())
    readme.write_text(text)
