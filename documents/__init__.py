"""Pages as documents: DocTags to elements, and elements to Markdown."""
