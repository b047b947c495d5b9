//! Placeholder ends beyond the main descriptor table.
