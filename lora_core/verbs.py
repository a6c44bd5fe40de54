"""All verbs: what the command line, `lora_core.api`, the warm worker and the window can do, each once.

The command line makes its parsers from these rows (`cli/` adds the options), the README's table and the names
of `lora_core.api` are tested against them, and every request of the worker and every POST route of the window
belongs to one, or is listed below with the reason why it needs no command. Rows are strings, so that reading
them imports nothing.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Verb:
    """One thing that the program can do.

    Attributes:
        name: on the command line; two words where the first is one of `GROUPS`.
        help: one line.
        window: where it is in the window, "" where only a terminal or a script needs it.
        routes: POST and PUT routes of the window that do it, a path below /easel/ and, where one route does
            several things, the value of its `do`.
        requests: what the warm worker is asked to do for it.
    """

    name: str
    help: str
    window: str = ""
    routes: tuple[str, ...] = ()
    requests: tuple[str, ...] = ()

    @property
    def function(self) -> str:
        """The function that does it, as `module:attribute`."""
        return f"lora_core.api:{self.name.replace(' ', '_').replace('-', '_')}"


GROUPS = {
    "queue": "train runs one after the other",
    "captions": "change the captions of a folder or project",
    "projects": "projects: pictures, captions, settings and runs",
    "caches": "encoded pictures and captions, unpacked zips",
    "trash": "deleted runs and projects",
}
"""First words of verbs of two words, with one line of help."""

VERBS = (
    Verb("train", "train an adapter on a dataset", "Train: Start training, Train like a LoRA file",
         ("like",)),
    Verb("forecast", "what a run will take: time, memory, file size, and what is in its way",
         "Train: above Start training", ("run measure", "run unmeasure"), ("probe",)),
    Verb("resume", "start a run or go on with it", "Header and Train: Resume", ("run resume", "run accept")),
    Verb("stop", "end a run, keep its work and export it", "Header: Stop", ("run stop",)),
    Verb("pause", "end a run's process, to go on later", "Header: Pause", ("run pause",)),
    Verb("save", "write a checkpoint now", "Train: Save now", ("run save",)),
    Verb("preview", "draw samples now", "Train: Sample now", ("run preview",)),
    Verb("runs", "list the runs of a workspace", "Train: Runs"),
    Verb("notify", "who is told when a run ends: a command or a web address", "Train: When a run ends"),
    Verb("delete", "move a run to the trash", "Train: Runs, Delete", ("run delete",)),
    Verb("debug", "a zip for a bug report, without pictures, paths and names", "Train: Zip for a bug report"),
    Verb("queue add", "put a run at the end of the queue", "Train: Add to queue"),
    Verb("queue list", "what is in the queue", "Train: Queue"),
    Verb("queue move", "give a waiting run another place", "Train: Queue, Up and Down",
         ("queue up", "queue down")),
    Verb("queue remove", "take a run out of the queue; the run stays", "Train: Queue, Remove",
         ("queue remove",)),
    Verb("queue run", "work through the queue, then end", "Train: Queue, Start", ("queue start",)),
    Verb("queue pause", "stop working through the queue; the run in hand is paused", "Train: Queue, Pause",
         ("queue pause",)),
    Verb("audit", "what is wrong with a dataset, and what will be learned from it", "Dataset: Check",
         ("check",)),
    Verb("probe", "what a base makes of captions: wrong ones, and words for a trigger",
         "Dataset: What the base makes of them", ("insights",), ("captions", "triggers")),
    Verb("pictures", "what a run has learned of each of its pictures", "Dataset: Measure each picture",
         ("insights",), ("pictures",)),
    Verb("leave-out", "move pictures of a project aside, with their captions", "Dataset: Leave out",
         ("leave-out",)),
    Verb("take-back", "put pictures that were left out back", "Dataset: Take back", ("take-back",)),
    Verb("hold-out", "choose the pictures of a project to measure on", "Dataset: Hold out", ("hold-out",)),
    Verb("captions set", "write the caption of one picture", "Dataset: the caption below a picture",
         ("caption",)),
    Verb("captions replace", "find and replace in all captions", "Dataset: All captions, Replace", ("bulk",)),
    Verb("captions prefix", "put a text in front of all captions", "Dataset: All captions, In front",
         ("bulk",)),
    Verb("captions suffix", "put a text at the end of all captions", "Dataset: All captions, At the end",
         ("bulk",)),
    Verb("captions rename-tag", "give a tag another name", "Dataset: All captions, Rename tag", ("bulk",)),
    Verb("captions delete-tag", "delete a tag", "Dataset: All captions, Delete tag", ("bulk",)),
    Verb("captions trigger", "add a trigger word to all captions that lack it", "Dataset: Add to all",
         ("bulk",)),
    Verb("captions undo", "take the last change of many captions back", "Dataset: All captions, Undo",
         ("bulk/undo",)),
    Verb("generate", "make pictures", "Preview", (), ("generate",)),
    Verb("grid", "make a labelled sheet of pictures that differ in one or two things", "Preview: Grid", (),
         ("sheet",)),
    Verb("validate", "measure an adapter on pictures that it was not trained on", "Train: the run's chart"),
    Verb("export", "write a checkpoint of a run as a file for other tools", "Export: Download", (),
         ("export",)),
    Verb("copy", "copy an adapter to where another tool looks for it", "Export: Copy there"),
    Verb("inspect", "what an adapter file is, whoever wrote it", "Export: Check a file",
         ("inside/start spectrum",), ("inspect", "spectrum")),
    Verb("verify", "what six tools would make of an adapter file", "Export: Works in", (), ("verify",)),
    Verb("convert", "translate an adapter file to another format", "Export: Look inside, Convert",
         ("inside/start convert",), ("convert",)),
    Verb("merge", "merge adapters into one file, or into a base", "Export: Look inside, Merge",
         ("inside/start merge", "inside/start into-base", "inside/start plain"), ("merge", "into-base")),
    Verb("shrink", "a smaller adapter file", "Export: Look inside, Shrink and Intrinsic rank",
         ("inside/start shrink", "inside/start intrinsic", "inside/act shrink"), ("shrink", "intrinsic")),
    Verb("extract", "a LoRA out of a fine-tuned model", "Export: Look inside, Extract",
         ("inside/start extract",), ("extract",)),
    Verb("strength", "the strength at which an adapter gains most", "Export: Look inside, Strength",
         ("inside/start strength", "inside/act bake"), ("strength", "bake")),
    Verb("compare", "how alike the directions of two adapters are", "Export: Look inside, Compare",
         ("inside/start compare",), ("compare",)),
    Verb("stack", "how adapters disturb each other when all are on", "Export: Look inside, Stack",
         ("inside/start stack",), ("stack",)),
    Verb("amplify", "how much stronger an adapter is than its base where it acts",
         "Export: Look inside, Amplify", ("inside/start amplify",), ("amplify",)),
    Verb("report", "a run as one self-contained page", "Export: Report", ("report/start",), ("report",)),
    Verb("projects list", "the projects of a workspace", "Header: Projects"),
    Verb("projects new", "make a project and open it in the window", "Header: Projects, New",
         ("projects new",)),
    Verb("projects import", "bring pictures into a project: a folder, a zip or a file",
         "Dataset: drop or path", ("import", "upload", "upload/{batch}")),
    Verb("projects open", "choose the project that the window opens with", "Header: Projects, Open",
         ("projects open",)),
    Verb("projects rename", "give a project another title", "Header: Projects, Rename", ("projects rename",)),
    Verb("projects delete", "move a project to the trash", "Header: Projects, Delete", ("projects delete",)),
    Verb("caches list", "how large each cache is", "Header: Projects"),
    Verb("caches clean", "remove what a run can make again", "Header: Projects, Clean caches",
         ("projects clean",)),
    Verb("trash list", "what can be restored", "Header: Projects, Trash"),
    Verb("trash restore", "put something back where it was", "Header: Projects, Trash, Restore",
         ("projects restore",)),
    Verb("trash empty", "remove all of it for good", "Header: Projects, Empty trash", ("projects empty",)),
    Verb("doctor", "what this computer has, and the fix for each thing that is wrong"),
    Verb("serve", "the warm worker: JSON lines in, JSON lines out"),
)  # fmt: skip

VIEW_STATE = {
    "tokens": "counts tokens while a caption is typed; `audit` names captions that are too long",
    "run see": "has the Preview tab draw a strip of a run's strengths; `grid` draws one",
    "run download": "downloads a base of the hub; every verb with --base does where it is needed",
    "run download-cancel": "drops what the page has asked for; Ctrl-C on the command line",
    "run download-ask": "asks the hub again how large a base is",
    "run show": "chooses the run that the Train tab shows",
    "preview/rows": "the sliders of the Preview tab; `generate --lora FILE:STRENGTH`",
    "preview/open": "the Preview tab was opened",
    "preview/cancel": "drops what the page has asked for; Ctrl-C on the command line",
    "preview/forget": "deletes a drawn picture from the history; it is a PNG file",
    "inside/go-on": "fills the Train form; `train --set adapter.init=FILE`",
    "inside/cancel": "drops what the page has asked for; Ctrl-C on the command line",
    "report/cancel": "drops what the page has asked for; Ctrl-C on the command line",
    "show-file": "opens the file manager; the commands print the path",
    "quit": "ends the window itself",
}
"""Routes of the window that need no command, with the reason."""

WORKER_STATE = {
    "release": "frees the memory of the worker's base",
    "warm": "starts the worker ahead of time",
}
"""Requests of the worker that need no command, with the reason."""


def verb(name: str) -> Verb:
    """The row of a verb."""
    return next(row for row in VERBS if row.name == name)
