"""Reports: HTML pages that work offline, and tables for a terminal or a document.

The modules are not imported here: importing matplotlib takes half a second, and not all of them need torch.
"""
