"""Pages for people: one HTML file each, readable without a network and without scripts."""
