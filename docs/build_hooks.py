"""What the build of the site does beyond its plugins: see `mkdocs.yml`."""

import ast
import html
import inspect
import itertools
import os
import re
import textwrap

import griffe
from latex2mathml.converter import convert


# Where references of docstrings to the libraries underneath link to. Their own
# inventories would have to be fetched at every build.
SITE = "https://docs.kidger.site/"
PAGES = {
    "lineax/api/linear_solve/": ["lineax.linear_solve"],
    "lineax/api/operators/": ["lineax.AbstractLinearOperator"],
    "lineax/api/solvers/": ["lineax.GMRES"],
}

# Mathematics in a page, as Arithmatex marks it, and in a Markdown cell of a tutorial.
MARKED = re.compile(
    r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', flags=re.DOTALL
)
CELL = re.compile(r'(?<=data-mime-type="text/markdown">).*?</div>', flags=re.DOTALL)
DOLLARS = re.compile(r"(\$\$?)([^$]+)\1")


def on_startup(command, dirty):
    """Show the figures of the tutorials, whatever Matplotlib does elsewhere."""
    del command, dirty
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"


def on_page_content(content, page, config, files):
    """Mathematics as MathML, which browsers show by themselves."""
    del page, config, files
    content = MARKED.sub(lambda m: _mathml(m[2], m[1] == "div"), content)
    return CELL.sub(
        lambda cell: DOLLARS.sub(lambda m: _mathml(m[2], m[1] == "$$"), cell[0]),
        content,
    )


def on_env(env, config, files):
    """A hook of MkDocs, called before references are resolved."""
    del env, files
    for page, names in PAGES.items():
        for name in names:
            config.plugins["autorefs"].register_url(name, f"{SITE}{page}#{name}")


class DropInheritedInit(griffe.Extension):
    """Drop what `object.__init__` says of itself: a class's docstring says it all."""

    def on_function(self, *, func, **kwargs):
        del kwargs
        if func.name == "__init__":
            func.docstring = None


class ListFields(griffe.Extension):
    """List the docstrings that stand under fields, which inspection does not see."""

    def on_class_members(self, *, node, cls, **kwargs):
        del kwargs
        if cls.docstring is None or not cls.module.path.startswith("implicitnets"):
            return
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(node.obj))).body
        fields = [
            f"- `{field.target.id}`: {' '.join(doc.value.value.split())}"
            for field, doc in itertools.pairwise(tree.body)
            if isinstance(field, ast.AnnAssign)
            and isinstance(doc, ast.Expr)
            and isinstance(doc.value, ast.Constant)
        ]
        if fields:
            text, *raises = cls.docstring.value.partition("**Raises:**")
            listed = "\n".join(["**Arguments:**\n", *fields])
            cls.docstring.value = "\n\n".join(
                [text.rstrip(), listed, "".join(raises)]
            ).rstrip()


def _mathml(latex: str, block: bool) -> str:
    return convert(html.unescape(latex), display="block" if block else "inline")
