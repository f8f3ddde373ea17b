"""Does a compiled model give finite, right outputs with the loader, and what does it give without?"""
