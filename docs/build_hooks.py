"""What the build of the site does beyond its plugins: see `mkdocs.yml`."""

import griffe


# Where references of docstrings to the libraries underneath link to. Their own
# inventories would have to be fetched at every build.
SITE = "https://docs.kidger.site/"
PAGES = {
    "lineax/api/linear_solve/": ["lineax.linear_solve"],
    "lineax/api/operators/": ["lineax.AbstractLinearOperator"],
    "lineax/api/solvers/": ["lineax.GMRES"],
}


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
