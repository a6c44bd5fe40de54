// The project picker: a dialog that lists the projects and their size on disk, as the server renders it.
(() => {
  const { one, all, get, post, make, t, fill, refocus } = window.easel;
  const say = (text) => { one("#projects-note").textContent = text; };

  const show = ({ html }) => {
    const place = one("#projects-shelves");
    refocus(place, () => fill(place, html));
    for (const when of all("time", place)) when.textContent = new Date(1000 * when.dataset.time).toLocaleString(document.documentElement.lang, { dateStyle: "medium", timeStyle: "short" });
  };

  const open = async () => {
    say("");
    one("#projects-done").textContent = "";
    // The previous list would be replaced while the user acts on it.
    one("#projects-shelves").replaceChildren();
    one("#projects").showModal();
    try { show(await get("projects")); } catch { say(t("The window does not answer.")); }
  };

  const act = async (body) => {
    await window.easel.waitingSaves();
    const answer = await post("projects", body);
    if (answer.problem) return say(answer.problem);
    // Every field belongs to the project: reload to fill them all.
    if (answer.switched) return window.easel.reopen();
    show(answer);
    say("");
    const undo = make("button", { type: "button", className: "own quiet", textContent: t("Undo"), data: { projectDo: "restore", project: answer.place } });
    one("#projects-done").replaceChildren(answer.done, ...(answer.place ? [" ", undo] : []));
  };

  // Asked in the row itself, next to its item.
  const askIn = (target, field, words, sends, tone = "primary") => {
    const place = target.closest(".row.apart"), yes = make("button", { className: `own ${tone}`, textContent: words });
    const no = make("button", { type: "button", className: "own", textContent: t("Cancel"), onclick: async () => show(await get("projects")) });
    place.replaceChildren(make("form", { className: "row grow", onsubmit: () => act(sends()) }, field, yes, no));
    (field.matches?.("label") ? one("input", field) : yes).focus();
  };

  document.addEventListener("click", (event) => {
    const target = event.target.closest("button");
    if (!target) return;
    const { projectDo: does, project } = target.dataset, row = target.closest(".row.apart"), title = does && row && one("b", row)?.textContent;
    const words = (textContent) => make("span", { className: "grow small", textContent });
    if (target.id === "project-picker") open();
    else if (target.id === "projects-close") one("#projects").close();
    else if (["open", "clean", "restore"].includes(does)) act({ do: does, project });
    else if (does === "rename") {
      const input = make("input", { type: "text", value: title, attributes: { "aria-label": t("New name of {title}", { title }) } });
      askIn(target, make("label", { className: "entry grow" }, input), t("Rename"), () => ({ do: "rename", project, title: input.value }));
    } else if (does === "delete" && !one(".chip", row)) act({ do: "delete", project, title });
    // Without the open project the page is loaded anew, and what undoes this is gone.
    else if (does === "delete") askIn(target, words(t("Delete “{title}”? Its images go to the trash, where Trash below restores them; runs are kept.", { title })), t("Delete"), () => ({ do: "delete", project }), "danger");
    else if (does === "empty") askIn(target, words(t("Delete everything in the trash permanently?")), t("Delete permanently"), () => ({ do: "empty" }), "danger");
  });

  document.addEventListener("submit", (event) => {
    if (event.target.id === "project-new") act({ do: "new", title: one("input", event.target).value });
  });
})();
