"""The documentation's site: ``sphinx-build -W docs build/docs``. Nothing is fetched, neither here nor by a reader's browser."""

from plpp_reg import __version__

project = "plpp-reg"
author = "the plpp-reg developers"
version = release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

html_theme = "furo"
html_title = f"plpp-reg {version}"
html_copy_source = False
html_show_copyright = False

myst_heading_anchors = 3
highlight_language = "text"  # of a block that names no language: equations, what a program printed

autodoc_member_order = "bysource"
maximum_signature_line_length = 88

# A reference that leads nowhere is an error (-W). Other packages' names have no page here.
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|collections|pathlib|typing_extensions|yacs|nn|plpp_reg\.engine\.log)\..*|Tensor"),
    (r"py:class", r"plpp_reg\.attachment\.with_plpp\.T"),  # a type variable
]
