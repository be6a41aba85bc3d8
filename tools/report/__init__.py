"""A localization or a comparison as one HTML file: a picture to send."""
