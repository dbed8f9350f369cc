"""RunSpec is what was asked, RunRecord is what happened. Plain values, read and written without torch.

A results directory holds one study per folder::

    DIR/<study>/study.json                                 `schema.StudyFile`: what was planned
    DIR/<study>/<experiment>/seed_<k>/progress.json        `progress.Attempt`, until the run is done
    DIR/<study>/<experiment>/seed_<k>/record.json          `schema.RunRecord`
    DIR/<study>/<experiment>/seed_<k>/adapter.safetensors  what was trained: adapter and head
    DIR/<study>/<experiment>/seed_<k>/features.safetensors  of training images, with measures.features
"""
