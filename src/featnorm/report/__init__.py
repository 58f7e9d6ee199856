"""Reports: HTML pages that work offline, and tables for a terminal or a document.

Modules that draw, such as `comparison`, are not imported here, because importing matplotlib takes half a second.
"""

from featnorm.report.tables import markdown_page, table_rows

__all__ = ["markdown_page", "table_rows"]
