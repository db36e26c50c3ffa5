"""`foldcut synthesise`."""

from __future__ import annotations

from ...data.synthetic import as_npz
from ...report.contact_sheet import contact_sheet, images_among
from ...support.atomic_files import write_folder
from ...support.errors import plural
from ...support.strict_json import json_text
from ...synthesis.synthesise import synthesise
from ..console import after_interrupt, guarded, out, show_line
from ..options import SynthesiseOptions
from ..samples import made_settings, read_cache, read_model


def run(options: SynthesiseOptions) -> None:
    """Carry it out."""

    def work() -> None:
        samples = synthesise(
            read_model(options),
            made_settings(options.count, options.input_shape, options.iterations),
            seed=options.seed,
            progress=not (options.as_json or options.quiet),
            cache=read_cache(options.cache, options.fresh),
        )
        output, picture = options.output, options.output.with_suffix(".png")
        files = {output.name: as_npz(samples, samples.made["inputs"])}
        images = images_among(samples)
        if images is not None:
            files[picture.name] = contact_sheet(images)
        write_folder(output.parent, files)
        if options.as_json:
            print(json_text({**samples.made, "files": [str(output.parent / name) for name in files]}))
        elif not options.quiet:
            show_line(f"{plural(samples.made['count'], 'sample')}: {samples.made['how']}", out)
            if samples.made["distance"]:
                before, after = (samples.made["distance"][side] for side in ("before", "after"))
                show_line(f"distance from the statistics of the batch norms {before:.4f}, then {after:.4f}", out)
            show_line(f"wrote {' and '.join(str(output.parent / name) for name in files)}", out)

    guarded(work, debug=options.debug, interrupted=after_interrupt(options.fresh))
