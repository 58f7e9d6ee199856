"""What featnorm found, as pages that need no network, and as tables for a terminal or a document.

The modules that draw, `comparison` and others, are imported by those who draw: matplotlib takes half a second.
"""

from featnorm.report.tables import markdown_page, table_rows

__all__ = ["markdown_page", "table_rows"]
