// The project picker: a dialog that lists the projects and what they take on disk.
(() => {
  const { one, get, post, make, plural } = window.easel;
  const say = (text) => { one("#projects-note").textContent = text; };

  const button = (does, text, project, tone = "quiet") => {
    const made = make("button", { type: "button", className: `own ${tone}`, textContent: text });
    made.dataset.projectDo = does;
    made.dataset.project = project?.key ?? "";
    if (project) made.setAttribute("aria-label", `${text} ${project.title}`);
    return made;
  };

  const row = (project) => {
    const words = make("div", { className: "grow" }, make("b", { textContent: project.title, dir: "auto" }),
      make("p", { className: "small num", textContent: `${plural(project.pictures, "image")}, ${plural(project.runs, "run")}, ${project.size}` }));
    const open = project.is_open ? make("span", { className: "chip accent", textContent: "Current" }) : button("open", "Open", project, "");
    return make("div", { className: "row apart" }, words, make("div", { className: "row" }, button("rename", "Rename", project), button("delete", "Delete", project), open));
  };

  // Names of trashed items are untrusted: inserted as text.
  const trashRow = (thing) => {
    const when = new Date(1000 * thing.time).toLocaleString("en", { dateStyle: "medium", timeStyle: "short" });
    const kind = thing.kind === "picture" ? "image" : thing.kind;
    const words = make("div", { className: "grow" }, make("b", { textContent: thing.name, dir: "auto" }),
      make("p", { className: "small num", textContent: `${kind}, ${thing.size}, deleted ${when}` }),
      make("p", { className: "small where" }, "From ", make("code", { textContent: thing.came_from })));
    const back = button("restore", "Restore", { key: thing.id, title: `the ${kind} ${thing.name}` }, "");
    return make("div", { className: "row apart" }, words, back);
  };
  const showTrash = (things) => {
    const fold = one("#projects-trash");
    fold.hidden = !things.length;
    one("summary", fold).textContent = `Trash, ${plural(things.length, "item")}`;
    window.easel.refocus(fold, () => one(".list", fold).replaceChildren(...things.map(trashRow)));
  };

  const show = (state) => {
    one("#projects-list").replaceChildren(...state.projects.map(row));
    showTrash(state.trashed);
    const room = one("#projects-room"), parts = [["runs", "Runs"], ["trash", "trash"]].filter(([key]) => state[key]);
    room.replaceChildren(make("span", { className: "small num grow", textContent: parts.map(([key, word]) => `${word} ${state[key]}`).join(", ") }));
    const does = make("div", { className: "row" });
    if (state.caches) does.append(button("clean", `Clear cache (${state.caches})`, null, ""));
    if (state.trash) does.append(button("empty", "Empty the trash", null, ""));
    room.append(does);
  };

  const open = async () => {
    const dialog = one("#projects");
    say("");
    one("#projects-said").textContent = "";
    // The previous list would be replaced while the user acts on it.
    one("#projects-list").replaceChildren();
    dialog.showModal();
    try { show(await get("projects")); } catch { say("The window does not answer."); }
  };

  const act = async (body) => {
    try {
      await window.easel.waitingSaves();
      const answer = await post("projects", body);
      if (answer.problem) return say(answer.problem);
      // Every field belongs to the project: reload to fill them all.
      if (answer.switched) return location.reload();
      show(answer);
      say("");
      one("#projects-said").textContent = answer.said;
    } catch (error) { say(error.message || "The window does not answer."); }
  };

  // Asked in the row itself, next to its item.
  const askIn = (target, field, words, sends, tone = "primary") => {
    const place = target.closest(".row.apart"), yes = make("button", { className: `own ${tone}`, textContent: words });
    const no = make("button", { type: "button", className: "own", textContent: "Cancel" });
    const form = make("form", { className: "row grow" }, field, yes, no);
    form.addEventListener("submit", (event) => { event.preventDefault(); act(sends()); });
    no.addEventListener("click", () => act_again());
    place.replaceChildren(form);
    (field.matches?.("label") ? one("input", field) : yes).focus();
  };
  const act_again = async () => show(await get("projects"));

  document.addEventListener("click", (event) => {
    const target = event.target.closest("button");
    if (!target) return;
    const { projectDo: does, project } = target.dataset;
    if (target.id === "project-picker") open();
    else if (target.id === "projects-close") one("#projects").close();
    else if (["open", "clean", "restore"].includes(does)) act({ do: does, project });
    else if (does === "rename") {
      const title = one("b", target.closest(".row.apart")).textContent, input = make("input", { type: "text", value: title });
      input.setAttribute("aria-label", `New name of ${title}`);
      askIn(target, make("label", { className: "entry grow" }, input), "Rename", () => ({ do: "rename", project, title: input.value }));
    } else if (does === "delete") {
      const title = one("b", target.closest(".row.apart")).textContent;
      askIn(target, make("span", { className: "grow small", textContent: `Delete “${title}”? Its images go to the trash, where Trash below restores them; runs are kept.` }), "Delete", () => ({ do: "delete", project }), "danger");
    } else if (does === "empty") askIn(target, make("span", { className: "grow small", textContent: "Delete everything in the trash for good?" }), "Delete for good", () => ({ do: "empty" }), "danger");
  });

  document.addEventListener("submit", (event) => {
    if (event.target.id !== "project-new") return;
    event.preventDefault();
    act({ do: "new", title: one("input", event.target).value });
  });
})();
