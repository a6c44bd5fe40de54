// Makes Gradio's modules, sent as text, known to the browser by an import map and starts the first.
((entry, modules) => {
  const imports = { "gradio/": "/assets/" };
  for (const [name, text] of Object.entries(modules)) {
    const blob = new Blob([text, `\n//# sourceURL=/assets/${name}`], { type: "text/javascript" });
    imports[`gradio/${name}`] = imports[`/assets/${name}`] = URL.createObjectURL(blob);
  }
  const map = Object.assign(document.createElement("script"), { type: "importmap", textContent: JSON.stringify({ imports }) });
  document.head.append(map);
  import(`gradio/${entry}`);
})
