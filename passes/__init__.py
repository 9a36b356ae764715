"""Graph transformations, one file each, every one a function ``run(graph, recipe) -> graph``."""

if __name__ != "pockc.passes":
    raise ImportError("import this package as pockc.passes: under two names it would define every class twice")
