"""The project picker in the header: a button that says which project is open, and the dialog behind it.

The dialog's list is drawn by `assets/projects.js` when it is opened.
"""

from app.moment import Moment
from app.words import safe

DIALOG = """<dialog id="projects" class="panel" aria-labelledby="projects-title">
<div class="row apart"><h2 id="projects-title">Projects</h2><button type="button" class="own quiet"
 id="projects-close">Close</button></div>
<p class="small">A project holds pictures, captions, the settings that you typed, and its runs.</p>
<form class="row" id="project-new"><label class="entry grow"><span class="away">Name of a new
project</span><input type="text"
 placeholder="Name of a new project" maxlength="80" autocomplete="off"></label><button
class="own primary">New</button></form>
<p class="problem" id="projects-note" role="alert"></p>
<div class="list" id="projects-list"></div>
<details id="projects-trash" hidden><summary></summary><div class="list"></div></details>
<p class="small" id="projects-said" role="status"></p>
<div class="row apart" id="projects-room"></div></dialog>"""


def project_button(moment: Moment) -> str:
    """Which project is open; opens the dialog."""
    project = moment.desk.project
    demo = " (demo pictures)" if project.uses_demo else ""
    return (
        '<button type="button" class="project" id="project-picker" aria-haspopup="dialog" title="Projects:'
        f' new, open, rename, delete"><span>{safe(project.title)}{demo}</span><svg viewBox="0 0 12 12"'
        ' aria-hidden="true"><path d="M2.5 4.5 6 8l3.5-3.5" fill="none" stroke="currentColor"'
        ' stroke-width="1.6"/></svg></button>'
    )
