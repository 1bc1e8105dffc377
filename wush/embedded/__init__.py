"""The texts that come with the package, as files: `README.md` here says what they are and under which licences.

`wush.texts.EmbeddedText` reads them and checks each against its SHA-256; `wush.embedded.make` made them.
"""
