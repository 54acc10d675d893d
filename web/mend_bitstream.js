// Lets Load Bitstream take a .mend file from the disk: by a button, or dropped on the node. ComfyUI's own upload widgets take
// pictures, sounds and videos only.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const SUFFIX = ".mend";

async function upload(node, file) {
  const body = new FormData();
  body.append("image", file); // the route's name for any file
  body.append("type", "input");
  const response = await api.fetchApi("/upload/image", { method: "POST", body });
  if (response.status !== 200) {
    alert(`${file.name} could not be uploaded: ${response.status} ${response.statusText}`);
    return;
  }
  const { name, subfolder } = await response.json();
  const path = subfolder ? `${subfolder}/${name}` : name;
  const widget = node.widgets.find((w) => w.name === "file");
  const values = widget.options.values;
  if (Array.isArray(values) && !values.includes(path)) values.push(path);
  widget.value = path;
  widget.callback?.(path);
  app.graph.setDirtyCanvas(true, true);
}

app.registerExtension({
  name: "Mend.LoadBitstream",
  nodeCreated(node) {
    if (node.comfyClass !== "MendLoadBitstream") return;
    const choose = () => {
      const input = Object.assign(document.createElement("input"), { type: "file", accept: SUFFIX });
      input.onchange = () => input.files.length && upload(node, input.files[0]);
      input.click();
    };
    const button = node.addWidget("button", "choose a .mend file", null, choose, { serialize: false });
    button.serialize = false;
    node.onDragOver = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
    node.onDragDrop = (event) => {
      const file = [...event.dataTransfer.files].find((f) => f.name.toLowerCase().endsWith(SUFFIX));
      if (file) upload(node, file);
      return Boolean(file);
    };
  },
});
